"""What a folder holds, hidden files included."""

from pathlib import Path


def names(folder: Path) -> list[str]:
    """The names in a folder, sorted."""
    return sorted(path.name for path in folder.iterdir())


def only(folder: Path, *expected: str) -> None:
    """Nothing else is in a folder."""
    assert names(folder) == sorted(expected)
