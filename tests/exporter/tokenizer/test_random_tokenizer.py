"""The tokenizer of random weights is the shipped one, filled up with pieces that no text has."""

from pathlib import Path

import pytest
import sentencepiece

from gemma_export.errors import UsageError
from gemma_export.exporter.config import tiny_folder
from gemma_export.exporter.tokenizer.random import write_random_tokenizer
from gemma_export.exporter.tokenizer.sentencepiece_model import PieceKind, parse_model

SHIPPED = tiny_folder() / "tokenizer.model"
TEXTS = ("Once upon a time", "<start_of_turn>user\nHi<end_of_turn>", "<random5000>", "naïve 日本語 \t\n")


@pytest.mark.parametrize("vocab_size", [2048, 2049, 256_000])
def test_has_every_size_and_cuts_as_the_shipped_one(vocab_size: int, tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.model"
    write_random_tokenizer(path, vocab_size)
    made = sentencepiece.SentencePieceProcessor(model_file=str(path))
    shipped = sentencepiece.SentencePieceProcessor(model_file=str(SHIPPED))
    assert made.get_piece_size() == vocab_size
    for text in TEXTS:
        assert made.encode(text) == shipped.encode(text)
        assert made.decode(made.encode(text)) == text


def test_added_pieces_are_unused_and_differ(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.model"
    write_random_tokenizer(path, 3000)
    pieces = parse_model(path.read_bytes()).pieces
    assert pieces[:2048] == parse_model(SHIPPED.read_bytes()).pieces
    assert {piece.kind for piece in pieces[2048:]} == {PieceKind.UNUSED}
    assert len({piece.text for piece in pieces}) == 3000


def test_smaller_than_the_shipped_one_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.model"
    with pytest.raises(UsageError, match="vocabulary of 2047 is smaller than the shipped tokenizer's 2048"):
        write_random_tokenizer(path, 2047)
    assert not path.exists()
