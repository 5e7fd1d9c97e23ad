"""SentencePiece models made by hand, piece by piece, with the settings a test asks for."""

import struct
from collections.abc import Iterable

from gemma_export.exporter.tokenizer.sentencepiece_model import Piece, PieceKind

CONTROL = [Piece(name, 0.0, PieceKind.CONTROL) for name in ("<pad>", "<eos>", "<bos>")]
UNKNOWN = [Piece("<unk>", 0.0, PieceKind.UNKNOWN)]
BYTES = [Piece(f"<0x{byte:02X}>", 0.0, PieceKind.BYTE) for byte in range(256)]


def normal(*texts: str) -> list[Piece]:
    """Normal pieces; the earlier one is merged first."""
    return [Piece(text, -float(index), PieceKind.NORMAL) for index, text in enumerate(texts)]


def user_defined(*texts: str) -> list[Piece]:
    return [Piece(text, 0.0, PieceKind.USER_DEFINED) for text in texts]


def gemma_like(*more: Piece) -> list[Piece]:
    """Laid out as Gemma's vocabulary: runs of tabs are pieces, a single tab is not."""
    turns = ("<start_of_turn>", "<end_of_turn>")
    runs = [text * length for text in ("\n", "▁") for length in range(1, 5) if text * length != "▁"]
    tabs = ("\t\t", "\t\t\t")
    letters = normal("he", "▁t", "▁the", "in", "er", "▁the▁", *"▁abcdefghinrt0123456789<>/")
    return [*CONTROL, *UNKNOWN, *user_defined(*turns, *runs, "<h1>", *tabs), *BYTES, *letters, *more]


def serialize(
    pieces: Iterable[Piece],
    *,
    model_type: int = 2,
    dummy_prefix: bool = False,
    remove_whitespace: bool = False,
    escape_whitespace: bool = True,
    byte_fallback: bool = True,
    bos: str = "<bos>",
) -> bytes:
    """The model file; field numbers are those of `sentencepiece_model.proto`."""
    names = {45: "<unk>", 46: bos, 47: "<eos>", 48: "<pad>"}
    trainer = _number(3, model_type) + _number(35, byte_fallback)
    trainer += b"".join(_bytes(number, name.encode()) for number, name in names.items())
    normalizer = _number(3, dummy_prefix) + _number(4, remove_whitespace) + _number(5, escape_whitespace)
    return b"".join(_bytes(1, _piece(piece)) for piece in pieces) + _bytes(2, trainer) + _bytes(3, normalizer)


def _piece(piece: Piece) -> bytes:
    score = bytes([2 << 3 | 5]) + struct.pack("<f", piece.score)
    return _bytes(1, piece.text.encode()) + score + _number(3, piece.kind)


def _number(field: int, value: int) -> bytes:
    return _varint(field << 3) + _varint(value)


def _bytes(field: int, value: bytes) -> bytes:
    return _varint(field << 3 | 2) + _varint(len(value)) + value


def _varint(value: int) -> bytes:
    low, high = value & 0x7F, value >> 7
    return bytes([low | 0x80]) + _varint(high) if high else bytes([low])
