from pathlib import Path

import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st
from support.small_bundle import TOKENIZER

from gemma_export.errors import BundleError, PromptError
from gemma_export.runtime.text_stream import TextStream
from gemma_export.runtime.tokenizer import REPLACEMENT, StreamDecoder, Tokenizer

# Characters of every UTF-8 length, spaces in all places, and the tokenizer's own marks.
TEXTS = st.text(st.one_of(st.characters(exclude_categories=["Cs"]), st.sampled_from(" \n\t▁<>é漢🙂\0")))
MODEL = Tokenizer(TOKENIZER, vocab_size=2048)
BYTES = [MODEL.piece_to_id(f"<0x{value:02X}>") for value in range(256)]
# Mostly bytes, so that runs of them form, break and end halfway through a character.
IDS = st.lists(
    st.one_of(
        st.sampled_from(
            [BYTES[value] for value in (0x41, 0xC3, 0xA9, 0xE2, 0x82, 0xAC, 0xF0, 0x9F, 0x99, 0xFF)]
        ),
        st.sampled_from(BYTES),
        st.integers(0, 2047),
    ),
    max_size=40,
)


def test_puts_the_beginning_in_front(tokenizer: Tokenizer) -> None:
    assert tokenizer.encode("Once")[0] == tokenizer.bos == 2
    assert tokenizer.encode("Once")[1:] == tokenizer.encode_plain("Once")


def test_a_beginning_that_is_spelled_out_is_not_doubled(tokenizer: Tokenizer) -> None:
    assert tokenizer.encode("<bos>Once") == tokenizer.encode("Once")
    assert tokenizer.encode("<bos>") == [tokenizer.bos]
    assert tokenizer.encode("<bos><bos>").count(tokenizer.bos) == 1


def test_turns_that_are_spelled_out_are_tokens(tokenizer: Tokenizer) -> None:
    assert tokenizer.piece_to_id("<end_of_turn>") in tokenizer.encode("a<end_of_turn>")


def test_missing_piece_is_named(tokenizer: Tokenizer) -> None:
    with pytest.raises(BundleError, match="no piece '<nowhere>'"):
        tokenizer.piece_to_id("<nowhere>")


def test_empty_prompt(tokenizer: Tokenizer) -> None:
    with pytest.raises(PromptError, match="empty"):
        tokenizer.encode("")


@pytest.mark.parametrize("text", ["a\ud800", "\udc80", b"\xff".decode("utf-8", "surrogateescape")], ids=ascii)
def test_half_a_surrogate_pair(tokenizer: Tokenizer, text: str) -> None:
    with pytest.raises(PromptError, match="not valid UTF-8"):
        tokenizer.encode(text)


def test_file_that_is_no_tokenizer(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(b"no tokenizer")
    with pytest.raises(BundleError, match="not a SentencePiece model"):
        Tokenizer(tmp_path / "tokenizer.model", vocab_size=2048)
    with pytest.raises(BundleError, match="not a SentencePiece model"):
        Tokenizer(tmp_path / "nowhere", vocab_size=2048)


def test_more_pieces_than_embeddings() -> None:
    with pytest.raises(BundleError, match="2048 pieces, the model 2000 embeddings"):
        Tokenizer(TOKENIZER, vocab_size=2000)


def test_a_tokenizer_that_puts_a_space_before_the_text(tmp_path: Path) -> None:
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["some words to learn from", "and some others"]),
        model_prefix=str(tmp_path / "other"),
        vocab_size=40,
        hard_vocab_limit=False,
        control_symbols=["<bos>"],
        minloglevel=3,
    )
    with pytest.raises(BundleError, match="does not keep spaces"):
        Tokenizer(tmp_path / "other.model", vocab_size=40)


def test_ids_of_a_padded_embedding_are_unknown() -> None:
    padded = Tokenizer(TOKENIZER, vocab_size=2112)
    assert padded.decode([2111]) == padded.decode([3]) == StreamDecoder(padded).decode_all([2111])


@settings(max_examples=150, deadline=None)
@given(TEXTS)
def test_text_survives(text: str) -> None:
    # SentencePiece writes a space as ▁ and cannot tell the two apart.
    assert MODEL.decode(MODEL.encode_plain(text)) == text.replace("▁", " ")


@settings(max_examples=150, deadline=None)
@given(TEXTS)
def test_streamed_text_is_the_text_and_shows_no_part_of_a_character(text: str) -> None:
    decoder = StreamDecoder(MODEL)
    ids = MODEL.encode_plain(text)
    pieces = [decoder.push(token) for token in ids]
    assert decoder.flush() == ""
    assert "".join(pieces) == MODEL.decode(ids)
    if REPLACEMENT not in text:
        assert not any(REPLACEMENT in piece for piece in pieces)


@settings(max_examples=200, deadline=None)
@given(IDS)
def test_any_streamed_ids_are_what_sentencepiece_decodes(ids: list[int]) -> None:
    assert StreamDecoder(MODEL).decode_all(ids) == MODEL.decode(ids)


def test_a_character_comes_with_its_last_byte() -> None:
    decoder = StreamDecoder(MODEL)
    assert [decoder.push(BYTES[byte]) for byte in "🙂".encode()] == ["", "", "", "🙂"]


def test_bytes_that_begin_no_character_come_at_once() -> None:
    decoder = StreamDecoder(MODEL)
    assert decoder.push(BYTES[0xE2]) == ""
    assert decoder.push(BYTES[0x41]) == REPLACEMENT + "A"
    assert decoder.push(BYTES[0xF0]) == ""
    assert decoder.flush() == REPLACEMENT


def stream(text: str, *stop: str) -> tuple[list[str], bool]:
    """One character per token, so that every stop string crosses tokens."""
    stream = TextStream(MODEL, stop)
    pieces = []
    for character in text:
        pieces += [stream.push(token) for token in MODEL.encode_plain(character)]
        if stream.stopped:
            break
    return [*pieces, stream.flush()], stream.stopped


def test_a_stop_string_is_never_shown() -> None:
    pieces, stopped = stream("one. STOP two", "STOP")
    assert stopped
    assert "".join(pieces) == "one. "


def test_what_may_become_a_stop_string_is_held_back() -> None:
    pieces, stopped = stream("STAR", "STOP")
    assert not stopped
    assert pieces == ["", "", "STA", "R", ""]


def test_a_held_beginning_is_shown_at_the_end() -> None:
    pieces, stopped = stream("an ST", "STOP")
    assert not stopped
    assert "".join(pieces) == "an ST"
    assert pieces[-1] == "ST"


def test_a_stop_string_after_a_false_beginning() -> None:
    assert "".join(stream("aab", "ab")[0]) == "a"


def test_the_first_of_several_stop_strings() -> None:
    assert "".join(stream("x and y", "y", "and")[0]) == "x "


@settings(max_examples=150, deadline=None)
@given(st.text("ab \n", max_size=20), st.lists(st.text("ab \n", min_size=1, max_size=4), max_size=3))
def test_stop_strings_cut_where_they_begin(text: str, stop: list[str]) -> None:
    """The shown text ends before the stop string that is complete first."""
    ends = [(text.index(s) + len(s), text.index(s)) for s in stop if s in text]
    first_end = min(ends, default=(len(text) + 1, 0))[0]
    starts = [start for end, start in ends if end == first_end]
    shown, stopped = stream(text, *stop)
    assert stopped == bool(ends)
    assert "".join(shown) == text[: min(starts, default=len(text))]
