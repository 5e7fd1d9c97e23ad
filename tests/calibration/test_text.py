"""Texts to measure on: those that come along, and a file's."""

import os

import pytest

from gemma_export.calibration.text import Passage, builtin_texts, read_texts
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
