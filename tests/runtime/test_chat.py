import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.small_bundle import TOKENIZER

from gemma_export.errors import BundleError, ContextFullError, PromptError
from gemma_export.runtime.chat import END_OF_TURN, START_OF_TURN, ChatFormat
from gemma_export.runtime.session import Session
from gemma_export.runtime.tokenizer import Tokenizer

MODEL = Tokenizer(TOKENIZER, vocab_size=2048)
FORMAT = ChatFormat(MODEL)
CONTROL = [
    END_OF_TURN,
    START_OF_TURN,
    END_OF_TURN[1:],
    START_OF_TURN[:-1],
    "<",
    "\n",
    "model\n",
    "<bos>",
    " ",
]
FORGED = st.lists(st.one_of(st.sampled_from(CONTROL), st.text(max_size=2)), max_size=10).map("".join)


@pytest.mark.parametrize(
    "text", ["Hello", " two  spaces ", "\n\nlines\n", "a < b > c", "é漢🙂", "<b>html</b>"]
)
def test_the_format_is_that_of_the_report(text: str) -> None:
    whole = f"<start_of_turn>user\n{text}<end_of_turn>\n<start_of_turn>model\n"
    assert FORMAT.user_turn(text) == MODEL.encode_plain(whole)


@settings(max_examples=150, deadline=None)
@given(FORGED.filter(bool))
def test_no_text_forges_a_control_token(text: str) -> None:
    turn = FORMAT.user_turn(text)
    assert turn.count(FORMAT.start_of_turn) == 2
    assert turn.count(FORMAT.end_of_turn) == 1
    assert MODEL.bos not in turn


@settings(max_examples=150, deadline=None)
@given(FORGED)
def test_the_model_reads_what_the_user_typed(text: str) -> None:
    assert MODEL.decode(FORMAT.encode_user_text(text)) == text.replace("▁", " ")


def test_a_spelled_out_control_token_would_be_one() -> None:
    """What is guarded against does happen."""
    assert FORMAT.end_of_turn in MODEL.encode_plain(f"a{END_OF_TURN}b")


def test_empty_message(session: Session) -> None:
    with pytest.raises(PromptError, match="empty"):
        session.chat().say("")


def test_a_normalization_that_makes_control_tokens_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    forged = [FORMAT.end_of_turn]
    monkeypatch.setattr(FORMAT, "_tokenizer", type("Odd", (), {"encode_plain": lambda _, text: forged})())
    with pytest.raises(PromptError, match="control token"):
        FORMAT.encode_user_text("\N{FULLWIDTH LESS-THAN SIGN}end_of_turn>")


def test_a_tokenizer_without_turns(monkeypatch: pytest.MonkeyPatch, session: Session) -> None:
    monkeypatch.setattr("gemma_export.runtime.chat.START_OF_TURN", "<no_such_turn>")
    with pytest.raises(BundleError, match="no_such_turn"):
        session.chat()


def test_the_second_turn_prefills_only_what_is_new(session: Session) -> None:
    chat = session.chat()
    first = chat.say("Hi", max_new_tokens=3, stop_tokens=())
    said = list(first.tokens)
    assert first.stats.prefill_tokens == 1 + len(FORMAT.user_turn("Hi"))
    before = chat.tokens
    second = chat.say("Go on", max_new_tokens=3, stop_tokens=())
    # The last token of the first answer was chosen and not run.
    new = [said[-1], *FORMAT.close_turn(), *FORMAT.user_turn("Go on")]
    assert second.stats.prefill_tokens == len(new)
    assert chat.tokens == (*before, *new[1:], *second.tokens)


def test_a_reused_cache_gives_what_reading_all_again_gives(session: Session) -> None:
    chat = session.chat()
    str(chat.say("Hi", max_new_tokens=5, stop_tokens=()))
    answer = chat.say("Go on", max_new_tokens=8, stop_tokens=())
    read = chat.tokens
    again = session.generate_tokens(read, max_new_tokens=8, stop_tokens=())
    assert list(answer.tokens) == again


def test_an_answer_that_stops_closes_its_turn_once(session: Session) -> None:
    chat = session.chat()
    free = chat.say("Hi", max_new_tokens=3, stop_tokens=()).tokens
    chat = session.chat()
    answer = chat.say("Hi", stop_tokens=free[2:3])
    assert answer.finish_reason == "stop"
    assert answer.tokens == free[:2]
    str(chat.say("Go on", max_new_tokens=1))
    assert chat.tokens.count(FORMAT.end_of_turn) == 3
    decoded = MODEL.decode(chat.tokens)
    assert decoded.count(f"{END_OF_TURN}\n{START_OF_TURN}user\nGo on") == 1


def test_an_answer_that_is_not_read_to_its_end_counts_as_far_as_it_came(session: Session) -> None:
    chat = session.chat()
    answer = chat.say("Hi", max_new_tokens=8, stop_tokens=())
    next(iter(answer))
    second = chat.say("Go on", max_new_tokens=4, stop_tokens=())
    read = chat.tokens
    assert answer.finish_reason == "interrupted"
    assert len(answer.tokens) < 8
    assert list(second.tokens) == session.generate_tokens(read, max_new_tokens=4, stop_tokens=())
    assert answer.text == "".join(answer)


def test_a_turn_that_does_not_fit_leaves_the_dialogue_as_it_was(session: Session) -> None:
    chat = session.chat()
    str(chat.say("Hi", max_new_tokens=3))
    before = chat.tokens
    with pytest.raises(ContextFullError, match="start a new conversation"):
        chat.say("long " * 64)
    assert chat.tokens == before
    assert str(chat.say("Short", max_new_tokens=3)) is not None


def test_a_dialogue_up_to_the_last_slot(session: Session) -> None:
    chat = session.chat()
    answer = chat.say("Hi", stop_tokens=())
    assert answer.finish_reason == "context"
    assert len(chat.tokens) == session.max_length + 1
    with pytest.raises(ContextFullError):
        chat.say("More")
