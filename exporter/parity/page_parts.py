"""Pieces of HTML that the sections of a parity report share."""

from collections.abc import Iterable
from html import escape


def row(first: str, *others: str) -> str:
    """A row of a table of numbers; the first cell is text, the others are ready for the page."""
    cells = "".join(f'<td class="number">{cell}</td>' for cell in others)
    return f"<tr><td>{escape(first)}</td>{cells}</tr>"


def row_of_words(*cells: str) -> str:
    """A row of a table of words, all of them text."""
    return f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in cells)}</tr>"


def table(header: tuple[str, ...], rows: Iterable[str]) -> str:
    """A table of numbers: all columns but the first stand to the right."""
    return _table(header, rows, " class=number")


def table_of_words(header: tuple[str, ...], rows: Iterable[str]) -> str:
    """A table whose columns all hold words."""
    return _table(header, rows, "")


def _table(header: tuple[str, ...], rows: Iterable[str], numbers: str) -> str:
    cells = "".join(
        f'<th{numbers if i else ""} scope="col">{escape(name)}</th>' for i, name in enumerate(header)
    )
    body = f"<thead><tr>{cells}</tr></thead><tbody>{''.join(rows)}</tbody>"
    return f'<div class="wide"><table>{body}</table></div>'
