from contextlib import suppress

import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st
from support.sentencepiece_files import gemma_like, serialize
from support.small_bundle import TOKENIZER

from gemma_export.exporter.tokenizer.sentencepiece_model import BPE, PieceKind, parse_model


def test_the_shipped_model_reads_as_sentencepiece_reads_it() -> None:
    processor = sentencepiece.SentencePieceProcessor(model_file=str(TOKENIZER))
    model = parse_model(TOKENIZER.read_bytes())
    assert len(model.pieces) == processor.get_piece_size()
    for index, piece in enumerate(model.pieces):
        assert piece.text == processor.id_to_piece(index)
        assert piece.score == processor.get_score(index)
        assert (piece.kind is PieceKind.CONTROL) == processor.is_control(index)
        assert (piece.kind is PieceKind.UNKNOWN) == processor.is_unknown(index)
        assert (piece.kind is PieceKind.BYTE) == processor.is_byte(index)
        assert (piece.kind is PieceKind.UNUSED) == processor.is_unused(index)
    assert model.pieces[107].kind is PieceKind.USER_DEFINED
    assert model.model_type == BPE
    assert not model.normalizes
    assert not model.adds_dummy_prefix
    assert not model.removes_extra_whitespace
    assert model.escapes_whitespace


def test_what_a_file_leaves_out_has_the_formats_default() -> None:
    pieces_only = b"\x0a\x03\x0a\x01a"  # Field 1: a piece whose field 1 is "a".
    model = parse_model(pieces_only)
    assert [(piece.text, piece.score, piece.kind) for piece in model.pieces] == [("a", 0.0, PieceKind.NORMAL)]
    assert model.model_type == 1
    assert model.adds_dummy_prefix
    assert model.removes_extra_whitespace
    assert model.escapes_whitespace


def test_messages_that_were_joined_by_appending_are_one() -> None:
    data = serialize(gemma_like())
    later = b"\x1a\x02\x18\x01"  # Field 3, the normalizer: field 3 is 1.
    model = parse_model(data + later)
    assert model.adds_dummy_prefix
    assert not model.removes_extra_whitespace


@settings(deadline=None)
@given(st.binary(max_size=200))
def test_what_is_no_model_is_a_value_error_and_nothing_else(data: bytes) -> None:
    with suppress(ValueError):
        assert parse_model(data).pieces


@pytest.mark.parametrize(
    "data",
    [b"", b"\x0a", b"\x0a\x05a", b"\x0b", b"\x08" + b"\xff" * 11, b"\x0a\x02\x10\x01", b"\x0a\x02\x12\x00"],
    ids=["empty", "no length", "cut off", "group", "endless number", "score of another type", "empty score"],
)
def test_damage_is_refused(data: bytes) -> None:
    with pytest.raises(ValueError, match=r"\w"):
        parse_model(data)
