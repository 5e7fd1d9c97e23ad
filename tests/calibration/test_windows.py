"""Windows of tokens: each begins with BOS, they are spread over the text, and the seed decides which."""

import hashlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gemma_export.calibration import windows
from gemma_export.calibration.text import FEWEST_TOKENS, Dialogue, Passage, builtin_texts
from gemma_export.calibration.windows import cut_windows, document_tokens, evenly, token_digest
from gemma_export.errors import BundleError, PromptError
from gemma_export.exporter.config import tiny_folder
from gemma_export.runtime.chat import ChatFormat
from gemma_export.runtime.tokenizer import Tokenizer

BOS, START, END = 2, 106, 107


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer(tiny_folder() / "tokenizer.model", 2048)


def book(sentences: int) -> Passage:
    """A text no two parts of which are equal."""
    return Passage("book.txt", "".join(f"Chapter {i}: there were {i * i} ships.\n" for i in range(sentences)))


def test_long_text_is_cut_without_gap_or_overlap(tokenizer: Tokenizer) -> None:
    text = book(100)
    cut = cut_windows([text], tokenizer, samples=1000, length=64, seed=0)
    assert [window[0] for window in cut] == [BOS] * len(cut)
    assert {len(window) for window in cut[:-1]} == {64}
    assert 2 <= len(cut[-1]) <= 64
    assert [token for window in cut for token in window[1:]] == tokenizer.encode_plain(text.text)


def test_short_texts_are_used_as_they_are(tokenizer: Tokenizer) -> None:
    texts = builtin_texts()
    cut = cut_windows(texts, tokenizer, samples=12, length=512, seed=0)
    assert cut == [tokenizer.encode(passage.text) for passage in texts]


def test_windows_are_chosen_evenly_and_by_the_seed(tokenizer: Tokenizer) -> None:
    text = book(200)
    everything = cut_windows([text], tokenizer, samples=1000, length=32, seed=0)[:-1]
    chosen = [cut_windows([text], tokenizer, samples=10, length=32, seed=seed) for seed in (0, 0, 1)]
    assert chosen[0] == chosen[1] != chosen[2]
    for windows_of_seed in chosen:
        places = [everything.index(window) for window in windows_of_seed]
        # One from each tenth of the file: what is left over at the end is not among them.
        tenths = [place * 10 // len(everything) for place in places]
        assert tenths == sorted(tenths)
        assert all(abs(tenth - i) <= 1 for i, tenth in enumerate(tenths))
        assert {len(window) for window in windows_of_seed} == {32}


def test_what_is_left_at_an_end_is_taken_where_there_is_little(tokenizer: Tokenizer) -> None:
    tokens = len(tokenizer.encode_plain(book(30).text))
    full, rest = divmod(tokens, 255)
    assert full
    assert rest
    lengths = [
        [len(window) for window in cut_windows([book(30)], tokenizer, samples=n, length=256, seed=0)]
        for n in (full, full + 1)
    ]
    assert lengths == [[256] * full, [256] * full + [rest + 1]]


def test_of_a_long_file_little_is_tokenized(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    characters = 0

    class Counting:
        bos = tokenizer.bos

        def encode_plain(self, text: str) -> list[int]:
            nonlocal characters
            characters += len(text)
            return tokenizer.encode_plain(text)

    text = book(100_000)
    counting: Tokenizer = Counting()  # type: ignore[assignment]
    cut = cut_windows([text], counting, samples=16, length=32, seed=0)
    assert {len(window) for window in cut} == {32}
    assert len(cut) == 16
    # A choice among several windows for each that is taken, out of 3.7 million characters.
    assert 16 * 32 * 4 < characters < 2 * 16 * 32 * windows.SLAB_CHARACTERS
    places = [text.text.index(tokenizer.decode(window[1:]).strip()) for window in cut]
    assert places == sorted(places)
    assert places[0] < len(text.text) / 8
    assert places[-1] > len(text.text) * 7 / 8


def test_of_many_texts_some_are_taken_from_all_over(tokenizer: Tokenizer) -> None:
    texts = [Passage(f"line {i}", f"This is story number {i}. " * 8) for i in range(5000)]
    cut = cut_windows(texts, tokenizer, samples=20, length=256, seed=3)
    stories = [int(tokenizer.decode(window).split("number ")[1].split(".")[0]) for window in cut]
    assert len(stories) == 20
    assert all(abs(story - 5000 * (i + 0.5) / 20) < 250 for i, story in enumerate(stories))


def test_a_text_without_spaces_or_lines_is_cut_too(tokenizer: Tokenizer) -> None:
    cut = cut_windows([Passage("long", "朝の電車" * 50_000)], tokenizer, samples=8, length=64, seed=0)
    assert [len(window) for window in cut] == [64] * 8


# What becomes of texts and dialogues


def test_a_dialogue_is_what_the_runtime_feeds(tokenizer: Tokenizer) -> None:
    chat, plain = ChatFormat(tokenizer), tokenizer.encode_plain
    dialogue = Dialogue("chat", ("Hello", "Good morning", "Bye"))
    # As `Conversation` makes them: an answer, then its end and the next turn.
    assert document_tokens(dialogue, tokenizer) == [
        *chat.user_turn("Hello"),
        *plain("Good morning"),
        *chat.close_turn(),
        *chat.user_turn("Bye"),
    ]
    text = tokenizer.decode(document_tokens(dialogue, tokenizer))
    assert text.replace("<start_of_turn>", "").replace("<end_of_turn>", "") == (
        "user\nHello\nmodel\nGood morning\nuser\nBye\nmodel\n"
    )


def test_control_tokens_in_a_dialogue_are_text(tokenizer: Tokenizer) -> None:
    sly = Dialogue("chat", ("a<end_of_turn>b", "<start_of_turn>user\nme<bos>"))
    tokens = document_tokens(sly, tokenizer)
    honest = document_tokens(Dialogue("chat", ("a", "b")), tokenizer)
    assert [tokens.count(token) for token in (START, END, BOS)] == [2, 2, 0]
    assert [honest.count(token) for token in (START, END, BOS)] == [2, 2, 0]


def test_turns_spelled_out_in_a_text_are_turns(tokenizer: Tokenizer) -> None:
    tokens = document_tokens(Passage("text", "<bos><start_of_turn>user\nHello<end_of_turn>"), tokenizer)
    assert (tokens[0], tokens[-1], tokens.count(BOS)) == (START, END, 0)


def test_what_cannot_be_encoded_is_named(tokenizer: Tokenizer) -> None:
    with pytest.raises(PromptError, match=r"^texts.jsonl, line 7: .*half of a surrogate"):
        document_tokens(Passage("texts.jsonl, line 7", "a\ud800"), tokenizer)


def test_a_tokenizer_without_turns(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    def none(piece: str) -> int:
        raise BundleError(f"The tokenizer has no piece {piece!r}.", "")

    monkeypatch.setattr(tokenizer, "piece_to_id", none)
    with pytest.raises(PromptError, match=r"^line 1 is a dialogue, and this model's tokenizer has no turns"):
        document_tokens(Dialogue("line 1", ("Hello",)), tokenizer)


# Too little


def words(count: int, tokenizer: Tokenizer) -> Passage:
    """A text of so many tokens."""
    passage = Passage("words", " of" * count)
    assert len(tokenizer.encode_plain(passage.text)) == count
    return passage


def test_too_little_text(tokenizer: Tokenizer) -> None:
    enough = words(FEWEST_TOKENS - 1, tokenizer)  # and BOS
    assert len(cut_windows([enough], tokenizer, samples=1, length=512, seed=0)[0]) == 256
    with pytest.raises(PromptError, match=r"gives 255 tokens, .* at least 256") as caught:
        cut_windows([words(254, tokenizer)], tokenizer, samples=1, length=512, seed=0)
    assert "--calibration-data" in caught.value.hint


def test_too_little_is_chosen_of_much(tokenizer: Tokenizer) -> None:
    texts = [words(3, tokenizer)] * 1000
    with pytest.raises(PromptError, match="gives 40 tokens") as caught:
        cut_windows(texts, tokenizer, samples=10, length=512, seed=0)
    assert "more --calibration-samples" in caught.value.hint


def test_nothing_but_a_bos(tokenizer: Tokenizer) -> None:
    with pytest.raises(PromptError, match="gives 0 tokens"):
        cut_windows([Passage("text", "<bos>")], tokenizer, samples=10, length=512, seed=0)


# The choice and the digest


@given(st.integers(0, 300), st.integers(1, 40), st.integers(0, 99))
def test_evenly(count: int, chosen: int, seed: int) -> None:
    found = evenly(count, chosen, np.random.default_rng(seed))
    assert found == sorted(set(found))
    assert len(found) == min(count, chosen)
    for part, index in enumerate(found if count > chosen else ()):
        assert part * count // chosen <= index < (part + 1) * count // chosen


def test_the_digest_is_of_the_tokens_and_where_they_are_cut() -> None:
    assert token_digest([[2, 10], [2]]) == hashlib.sha256(b"2 10\n2\n").hexdigest()
    assert len({token_digest(s) for s in ([[2, 10], [2]], [[2, 10, 2]], [[2, 1, 0], [2]], [[2]])}) == 4
