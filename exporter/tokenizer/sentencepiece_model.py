"""What a SentencePiece model file says: its pieces, and the settings that decide how it cuts text.

The `sentencepiece` package does not tell which pieces are user-defined or how text is normalized, and the
protobuf module it brings demands one release of protobuf at run time. So the few fields needed are read here.

Sources: google/sentencepiece `src/sentencepiece_model.proto`; the wire format at
https://protobuf.dev/programming-guides/encoding.
"""

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from enum import IntEnum

BPE = 2
"""The model type of byte-pair encoding; 1 is unigram, 3 words, 4 characters."""


class PieceKind(IntEnum):
    """The types of a piece, numbered as in the file."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


@dataclass(frozen=True)
class Piece:
    """One row of the vocabulary; in byte-pair encoding, the higher the score the earlier it is merged."""

    text: str
    score: float
    kind: PieceKind


@dataclass(frozen=True)
class SentencePieceModel:
    """The pieces by id, and the settings; what a file does not set has the format's default."""

    pieces: tuple[Piece, ...]
    model_type: int
    normalizes: bool
    adds_dummy_prefix: bool
    removes_extra_whitespace: bool
    escapes_whitespace: bool

    def ids(self, *kinds: PieceKind) -> list[int]:
        """The ids of the pieces of some kinds, in order."""
        return [index for index, piece in enumerate(self.pieces) if piece.kind in kinds]


def parse_model(data: bytes) -> SentencePieceModel:
    """Reads a serialized model.

    Raises:
        ValueError: It is cut off, or is not a SentencePiece model.
    """
    pieces: list[Piece] = []
    trainer: dict[int, int | memoryview] = {}
    normalizer: dict[int, int | memoryview] = {}
    for number, value in _fields(memoryview(data)):
        if number == 1:
            pieces.append(_piece(_message(value)))
        elif number == 2:
            trainer.update(_fields(_message(value)))
        elif number == 3:
            normalizer.update(_fields(_message(value)))
    if not pieces:
        raise ValueError("it has no pieces")
    return SentencePieceModel(
        tuple(pieces),
        model_type=_number(trainer.get(3, 1)),
        normalizes=bool(normalizer.get(2, b"")),
        adds_dummy_prefix=bool(normalizer.get(3, 1)),
        removes_extra_whitespace=bool(normalizer.get(4, 1)),
        escapes_whitespace=bool(normalizer.get(5, 1)),
    )


def _piece(message: memoryview) -> Piece:
    text, score, kind = "", 0.0, PieceKind.NORMAL
    for number, value in _fields(message):
        if number == 1:
            text = bytes(_message(value)).decode()
        elif number == 2:
            score = _float(_message(value))
        elif number == 3:
            kind = PieceKind(_number(value))
    return Piece(text, score, kind)


def _fields(message: memoryview) -> Iterator[tuple[int, int | memoryview]]:
    """The number and value of each field: a number where it is a varint, else the bytes it takes."""
    position = 0
    while position < len(message):
        key, position = _varint(message, position)
        number, wire_type = key >> 3, key & 7
        if wire_type == 0:
            value, position = _varint(message, position)
            yield number, value
            continue
        if wire_type == 2:
            length, position = _varint(message, position)
        elif wire_type in (1, 5):
            length = 8 if wire_type == 1 else 4
        else:
            raise ValueError(f"field {number} has wire type {wire_type}")
        if position + length > len(message):
            raise ValueError(f"field {number} is cut off")
        yield number, message[position : position + length]
        position += length


def _varint(message: memoryview, position: int) -> tuple[int, int]:
    """The number at a position, seven bits a byte from the lowest on, and the position after it."""
    number = 0
    for shift in range(0, 70, 7):
        if position >= len(message):
            raise ValueError("it ends within a number")
        byte = message[position]
        position += 1
        number |= (byte & 0x7F) << shift
        if byte < 0x80:
            return number, position
    raise ValueError("a number has more than ten bytes")


def _float(value: memoryview) -> float:
    if len(value) != 4:
        raise ValueError(f"a score has {len(value)} bytes")
    (number,) = struct.unpack("<f", value)
    return float(number)


def _message(value: int | memoryview) -> memoryview:
    if isinstance(value, int):
        raise ValueError("a number stands where text or a message belongs")
    return value


def _number(value: int | memoryview) -> int:
    if not isinstance(value, int):
        raise ValueError("text or a message stands where a number belongs")
    return value
