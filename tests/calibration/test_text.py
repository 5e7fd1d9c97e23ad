"""Texts to measure on and to calibrate with: those that come along, and a file's."""

import json
import os
from pathlib import Path

import pytest

from gemma_export.calibration.text import Dialogue, Passage, builtin_texts, read_documents, read_texts
from gemma_export.errors import PromptError
from gemma_export.exporter.config import tiny_folder
from gemma_export.runtime.tokenizer import Tokenizer


def test_a_dozen_different_passages():
    texts = builtin_texts()
    assert len(texts) == 12
    assert len({passage.name for passage in texts}) == 12
    for passage in texts:
        assert passage.text == passage.text.strip() or passage.name == "dialogue"
        assert 100 < len(passage.text) < 500, passage.name


def test_they_tokenize_to_enough_tokens_and_back():
    tokenizer = Tokenizer(tiny_folder() / "tokenizer.model", 2048)
    for passage in builtin_texts():
        tokens = tokenizer.encode_plain(passage.text)
        assert len(tokens) > 48, passage.name
        assert tokenizer.decode(tokens) == passage.text


def test_they_are_of_many_kinds():
    together = "".join(passage.text for passage in builtin_texts())
    for piece in ("def ", '": ', "ß", "é", "à", "朝", "08:30", "|---", "@", "3. "):
        assert piece in together, piece


def test_a_file_is_split_at_blank_lines(tmp_path):
    path = tmp_path / "text.txt"
    path.write_bytes("\ufefffirst\r\nline two\r\n\r\n \t\r\n  indented\n\n\nZwölf\n".encode())
    assert read_texts(path) == (
        Passage("text.txt, passage 1", "first\nline two"),
        Passage("text.txt, passage 2", "  indented"),
        Passage("text.txt, passage 3", "Zwölf"),
    )
    assert read_texts(str(path)) == read_texts(path)


def test_one_line_is_a_passage(tmp_path):
    (tmp_path / "text.txt").write_text("word")
    assert [passage.text for passage in read_texts(tmp_path / "text.txt")] == ["word"]


@pytest.mark.parametrize(
    ("content", "words"),
    [(b"", "no text"), (b" \n\t\r\n\n", "no text"), (b"ok \xff\xfe", "not UTF-8: byte 3"), (None, "no file")],
    ids=["empty", "blank", "not UTF-8", "missing"],
)
def test_what_is_no_text_is_refused_with_a_hint(tmp_path, content, words):
    path = tmp_path / "text.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(PromptError, match=words) as caught:
        read_texts(path)
    assert str(path) in caught.value.message
    assert caught.value.hint
    assert caught.value.exit_code == 2


def test_a_folder_is_refused(tmp_path):
    with pytest.raises(PromptError, match="cannot be read"):
        read_texts(tmp_path)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_that_may_not_be_read_is_refused(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("secret")
    path.chmod(0)
    with pytest.raises(PromptError, match="cannot be read"):
        read_texts(path)


# Files to calibrate with


def turns(*said: tuple[str, str]) -> list[dict[str, str]]:
    return [{"role": role, "content": content} for role, content in said]


HELLO = turns(("user", "Hello"), ("model", "Good morning"))


def lines(path: Path, *values: object) -> Path:
    path.write_text("".join(f"{json.dumps(value)}\n" for value in values))
    return path


def refusal(path: Path) -> PromptError:
    with pytest.raises(PromptError) as caught:
        read_documents(path)
    assert caught.value.message.endswith(".")
    assert caught.value.hint
    return caught.value


def test_plain_text_is_one_document(tmp_path):
    path = tmp_path / "book.txt"
    path.write_bytes("\ufeffChapter 1\r\n\r\nOnce\rupon.\n".encode())
    assert read_documents(path) == (Passage("book.txt", "Chapter 1\n\nOnce\nupon.\n"),)
    assert read_documents(str(path)) == read_documents(path)


def test_lines_of_text(tmp_path):
    path = tmp_path / "texts.jsonl"
    path.write_text('{"text": "one\\ntwo", "url": 3}\n\n {"text": " "}\n{"text": "a\u2028b"}', "utf-8")
    assert read_documents(path) == (
        Passage("texts.jsonl, line 1", "one\ntwo"),
        Passage("texts.jsonl, line 4", "a\u2028b"),  # U+2028 ends a line for some, not for JSON lines
    )


@pytest.mark.parametrize("name", ["texts.json", "texts.txt", "texts"])
def test_what_a_file_is_its_content_says(tmp_path, name):
    assert read_documents(lines(tmp_path / name, {"text": "a"}, {"text": "b"})) == (
        Passage(f"{name}, line 1", "a"),
        Passage(f"{name}, line 2", "b"),
    )


@pytest.mark.parametrize("first", ["[1, 2]", '"text"', "12", '{"text": "cut', "{", "[" * 100_000])
def test_plain_text_may_look_like_json(tmp_path, first):
    path = tmp_path / "text.txt"
    path.write_text(f"{first}\nand more")
    assert read_documents(path) == (Passage("text.txt", f"{first}\nand more"),)


@pytest.mark.parametrize("key", ["messages", "conversation"])
@pytest.mark.parametrize("role", ["model", "assistant"])
def test_dialogues(tmp_path, key, role):
    said = turns(("user", "Hello"), (role, "Good morning"), ("user", "Bye"))
    path = lines(tmp_path / "chat.jsonl", {key: said, "text": "not this"}, {"text": "a text among them"})
    assert read_documents(path) == (
        Dialogue("chat.jsonl, line 1", ("Hello", "Good morning", "Bye")),
        Passage("chat.jsonl, line 2", "a text among them"),
    )


def test_a_system_message_is_put_before_the_first_turn(tmp_path):
    said = turns(("system", "Be brief."), ("user", "Hello"), ("model", "Hi"))
    (dialogue,) = read_documents(lines(tmp_path / "chat.jsonl", {"messages": said}))
    assert dialogue == Dialogue("chat.jsonl, line 1", ("Be brief.\n\nHello", "Hi"))


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ('{"text": "cut off', "is not JSON"),
        ("plain text", "is not JSON"),
        ("[" * 100_000, "is not JSON"),
        ('["text"]', "is not a JSON object"),
        ('{"prompt": "a"}', "has neither 'text' nor 'messages'"),
        ('{"text": null}', "'text' is not a text"),
        ('{"text": ["a"]}', "'text' is not a text"),
        ('{"messages": "Hello"}', "is not a list of messages"),
        ('{"messages": []}', "is not a list of messages"),
        ('{"messages": ["Hello"]}', "message 1 is not an object"),
        (json.dumps({"messages": turns(("human", "Hello"))}), "message 1 has the role 'human'"),
        ('{"messages": [{"role": ["user"], "content": "a"}]}', "message 1 has the role"),
        ('{"messages": [{"role": "user"}]}', "message 1 has no text in its 'content'"),
        ('{"messages": [{"role": "user", "content": [{"text": "a"}]}]}', "no text in its 'content'"),
        (json.dumps({"messages": turns(("user", "a"), ("model", " "))}), "message 2 has no text"),
        (json.dumps({"messages": turns(("model", "Hi"))}), "of the model where the user speaks"),
        (json.dumps({"messages": [*HELLO, *HELLO[1:]]}), "of the model where the user speaks"),
        (json.dumps({"messages": [HELLO[0], HELLO[0]]}), "of the user where the model speaks"),
        (json.dumps({"messages": turns(("system", "Be brief."))}), "no message of the user"),
        (json.dumps({"messages": [*HELLO, *turns(("system", "a"))]}), "of the system where the user speaks"),
    ],
    ids=lambda value: value[:60],
)
def test_a_bad_line_is_named(tmp_path, line, words):
    path = tmp_path / "chat.jsonl"
    path.write_text(f"{json.dumps({'messages': HELLO})}\n\n{line}\n")
    message = refusal(path).message
    assert message.startswith("chat.jsonl, line 3")
    assert words in message


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("text.txt", b" \n\r\n", "no text"),
        ("text.jsonl", b"", "no text"),
        ("text.jsonl", b'{"text": ""}\n{"text": "\\n"}', "no text"),
        ("text.jsonl", b"Once upon a time", "line 1 is not JSON"),
        ("text.NDJSON", b"Once upon a time", "line 1 is not JSON"),
        ("text.json", b'[{"text": "a"}]', "its first line is no object"),
        ("text.json", b'{\n  "text": "a"\n}', "its first line is no object"),
        ("text.txt", b"\xff\xfeO\x00n\x00", "not UTF-8: byte 0"),
        ("text.jsonl.gz", b"\x1f\x8b\x08", "not UTF-8: byte 1"),
        ("text.txt", None, "no file"),
    ],
    ids=[
        "blank",
        "empty",
        "empty texts",
        "plain",
        "ndjson",
        "a list",
        "on many lines",
        "UTF-16",
        "gzip",
        "missing",
    ],
)
def test_files_that_cannot_be_used(tmp_path, name, content, words):
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    assert words in refusal(path).message


def test_a_folder_is_no_text(tmp_path):
    assert "cannot be read" in refusal(tmp_path).message
