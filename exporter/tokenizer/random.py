"""A tokenizer for random weights: the shipped one, filled up with unused pieces to any size.

Random weights say nothing, but a size can be tried with them, and the runtime needs a tokenizer as large as
the embedding table. Unused pieces never occur in a text, so prompts are cut as the shipped tokenizer cuts
them.
"""

from pathlib import Path

from gemma_export.errors import UsageError
from gemma_export.exporter.config import tiny_folder
from gemma_export.exporter.tokenizer.sentencepiece_model import PieceKind, parse_model


def write_random_tokenizer(path: Path, vocab_size: int) -> None:
    """Writes a SentencePiece model of `vocab_size` pieces.

    A serialized protobuf message is extended by appending to it: repeated fields of both parts are joined.

    Raises:
        UsageError: The shipped tokenizer already has more pieces.
    """
    data = (tiny_folder() / "tokenizer.model").read_bytes()
    pieces = len(parse_model(data).pieces)
    if vocab_size < pieces:
        raise UsageError(
            f"A vocabulary of {vocab_size} is smaller than the shipped tokenizer's {pieces} pieces.",
            "Give --tokenizer PATH.",
        )
    path.write_bytes(data + b"".join(_unused_piece(index) for index in range(pieces, vocab_size)))


def _unused_piece(index: int) -> bytes:
    """Field 1 of `ModelProto`: a `SentencePiece` with its text (field 1) and its kind (field 3)."""
    text = f"<random{index}>".encode()
    message = b"\x0a" + bytes([len(text)]) + text + b"\x18" + bytes([PieceKind.UNUSED])
    return b"\x0a" + bytes([len(message)]) + message
