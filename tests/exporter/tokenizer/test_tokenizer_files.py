import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import jinja2
import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st
from support.sentencepiece_files import (
    BYTES,
    CONTROL,
    UNKNOWN,
    gemma_like,
    normal,
    serialize,
    user_defined,
)
from support.small_bundle import TOKENIZER
from tokenizers import Tokenizer

from gemma_export.errors import CheckpointError
from gemma_export.exporter.tokenizer import files
from gemma_export.exporter.tokenizer.files import TokenizerFacts, write_tokenizer
from gemma_export.exporter.tokenizer.random import write_random_tokenizer
from gemma_export.exporter.tokenizer.sentencepiece_model import Piece, PieceKind
from gemma_export.runtime.chat import ChatFormat
from gemma_export.runtime.tokenizer import Tokenizer as RuntimeTokenizer

TRICKY = [
    *("", " ", "\n", "\t", "\r\n", "▁", " ▁ ", "the", " the ", "  the   the    the", "the\n\nthe\n"),
    *("1234 56.78", "naïve café cafe\u0301", "😀👩‍👩‍👧", "你好", "a\0b", "\ufeff\u200b\u2028", "\U0010ffff"),
    *(
        "<start_of_turn>user\nhe<end_of_turn>\n",
        "<start_of_turn",
        "<<end_of_turn>>",
        " <h1> the</h1>",
        "<unk>",
    ),
    *("<0x0A>", "\n" * 50, " " * 100, "\t" * 9, " \t \t\t  \n \n\n", "\t\n\t", " " * 9 + "the" + " " * 9),
]


@dataclass(frozen=True)
class Pair:
    """A SentencePiece model and the `tokenizer.json` that was made from it."""

    folder: Path
    facts: TokenizerFacts
    original: sentencepiece.SentencePieceProcessor
    written: Tokenizer

    def assert_equal(self, text: str) -> None:
        expected = self.original.encode(text)
        found = self.written.encode(text, add_special_tokens=False).ids
        assert found == expected, text
        assert self.written.decode(found, skip_special_tokens=False) == self.original.decode(expected)


def made_from(source: Path, folder: Path) -> Pair:
    original = sentencepiece.SentencePieceProcessor(model_file=str(source))
    facts = write_tokenizer(source, folder, context_length=512, vocab_size=original.get_piece_size())
    return Pair(folder, facts, original, Tokenizer.from_file(str(folder / "tokenizer.json")))


@pytest.fixture(scope="module")
def shipped(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return made_from(TOKENIZER, tmp_path_factory.mktemp("shipped"))


@pytest.fixture(scope="module")
def like_gemma(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    folder = tmp_path_factory.mktemp("gemma")
    (folder / "source").write_bytes(serialize(gemma_like()))
    return made_from(folder / "source", folder)


@pytest.fixture(params=["shipped", "like_gemma"])
def pair(request: pytest.FixtureRequest) -> Pair:
    found: Pair = request.getfixturevalue(request.param)
    return found


def write_model(path: Path, pieces: Sequence[Piece]) -> int:
    path.write_bytes(serialize(pieces))
    return len(pieces)


def test_control_tokens_are_found_by_piece(shipped: Pair, like_gemma: Pair) -> None:
    assert shipped.facts == TokenizerFacts(2048, 2, 1, 0, (1, 107), 106, 107)
    assert like_gemma.facts == TokenizerFacts(len(gemma_like()), 2, 1, 0, (1, 5), 4, 5)


def test_the_original_is_copied_byte_by_byte(shipped: Pair) -> None:
    assert (shipped.folder / "tokenizer.model").read_bytes() == TOKENIZER.read_bytes()


def test_a_tokenizer_already_in_the_folder_stays(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(TOKENIZER.read_bytes())
    write_tokenizer(tmp_path / "tokenizer.model", tmp_path, context_length=512, vocab_size=2048)
    assert (tmp_path / "tokenizer.model").read_bytes() == TOKENIZER.read_bytes()


@pytest.mark.parametrize("text", TRICKY, ids=ascii)
def test_tricky_texts_are_cut_alike(pair: Pair, text: str) -> None:
    pair.assert_equal(text)


@settings(deadline=None)
@given(text=st.text(max_size=80))
def test_any_unicode_is_cut_alike(shipped: Pair, like_gemma: Pair, text: str) -> None:
    text = without_control(text)
    shipped.assert_equal(text)
    like_gemma.assert_equal(text)


@settings(deadline=None)
@given(parts=st.lists(st.sampled_from([*TRICKY, *"etaoinsh  \n\t07<>/1h", "<mask>", "<unused7>", "é", "▁▁"])))
def test_any_mixture_is_cut_alike(shipped: Pair, like_gemma: Pair, parts: list[str]) -> None:
    text = without_control("".join(parts))
    shipped.assert_equal(text)
    like_gemma.assert_equal(text)


def without_control(text: str) -> str:
    for token in ("<pad>", "<eos>", "<bos>"):
        text = text.replace(token, "")
    return text


def test_a_run_of_tabs_is_a_piece_where_one_tab_is_a_byte(like_gemma: Pair) -> None:
    found = like_gemma.written.encode("a\tb\t\t\t\t\t", add_special_tokens=False).tokens
    assert found == ["a", "<0x09>", "b", "\t\t\t", "\t\t"]


def test_only_control_tokens_spelled_out_differ(shipped: Pair) -> None:
    assert shipped.written.encode("<bos>a<eos>", add_special_tokens=False).ids == [
        2,
        *shipped.original.encode("a"),
        1,
    ]
    assert 2 not in shipped.original.encode("<bos>a<eos>")


def test_a_text_begins_with_bos_unless_told_otherwise(shipped: Pair) -> None:
    assert shipped.written.encode("the").ids == [2, *shipped.original.encode("the")]


def test_turn_tokens_are_special_and_markup_is_not(like_gemma: Pair) -> None:
    found = like_gemma.written.encode("<start_of_turn><h1>he<end_of_turn>").ids
    assert like_gemma.written.decode(found) == "<h1>he"


def test_the_configuration_names_what_a_client_needs(shipped: Pair) -> None:
    written = json.loads((shipped.folder / "tokenizer_config.json").read_text())
    written.pop("chat_template")
    assert written == {
        "tokenizer_class": "GemmaTokenizer",
        "add_bos_token": True,
        "add_eos_token": False,
        "bos_token": "<bos>",
        "eos_token": "<eos>",
        "pad_token": "<pad>",
        "unk_token": "<unk>",
        "clean_up_tokenization_spaces": False,
        "model_max_length": 512,
    }


def render(pair: Pair, *messages: tuple[str, str], add_generation_prompt: bool = True) -> str:
    def refuse(message: str) -> None:
        raise ValueError(message)

    written = json.loads((pair.folder / "tokenizer_config.json").read_text())
    rendered: str = jinja2.Template(written["chat_template"]).render(
        messages=[{"role": role, "content": content} for role, content in messages],
        add_generation_prompt=add_generation_prompt,
        bos_token=written["bos_token"],
        raise_exception=refuse,
    )
    return rendered


def test_the_chat_template_is_gemmas_dialogue(shipped: Pair) -> None:
    text = render(shipped, ("user", "Who?"), ("assistant", "I."), ("user", "  Why?\n"))
    assert text == (
        "<bos><start_of_turn>user\nWho?<end_of_turn>\n<start_of_turn>model\nI.<end_of_turn>\n"
        "<start_of_turn>user\n  Why?\n<end_of_turn>\n<start_of_turn>model\n"
    )
    assert render(shipped, ("model", "I."), add_generation_prompt=False).endswith("model\nI.<end_of_turn>\n")
    with pytest.raises(ValueError, match="user and assistant"):
        render(shipped, ("system", "Be brief."))


def test_the_chat_template_and_the_runtime_agree(shipped: Pair) -> None:
    format_ = ChatFormat(RuntimeTokenizer(TOKENIZER, vocab_size=2048))
    text = render(shipped, ("user", "Who goes  there?\n"))
    found = shipped.written.encode(text, add_special_tokens=False).ids
    assert found == [2, *format_.user_turn("Who goes  there?\n")]


def test_a_vocabulary_without_turns_has_no_chat(tmp_path: Path) -> None:
    pieces = [*CONTROL, *UNKNOWN, *BYTES, *normal("ab", "a", "b", "▁")]
    size = write_model(tmp_path / "source", pieces)
    facts = write_tokenizer(tmp_path / "source", tmp_path, context_length=512, vocab_size=size)
    assert (facts.stop_ids, facts.start_of_turn, facts.end_of_turn) == ((1,), None, None)
    assert "chat_template" not in json.loads((tmp_path / "tokenizer_config.json").read_text())


def test_a_tokenizer_filled_up_with_unused_pieces_is_fine(tmp_path: Path) -> None:
    write_random_tokenizer(tmp_path / "source", 4000)
    pair = made_from(tmp_path / "source", tmp_path)
    assert pair.facts.pieces == 4000
    pair.assert_equal("The quick  brown fox")


def test_another_models_tokenizer_is_refused_with_both_sizes(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"2048 pieces.* 256128 rows"):
        write_tokenizer(TOKENIZER, tmp_path, context_length=512, vocab_size=256128)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"model_type": 1}, "not byte-pair encoding"),
        ({"dummy_prefix": True}, "a space before every text"),
        ({"remove_whitespace": True}, "removes spaces"),
        ({"escape_whitespace": False}, "does not write spaces"),
        ({"bos": "<start>"}, "no <bos>"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_another_kind_of_tokenizer_is_refused(
    tmp_path: Path, changes: dict[str, object], reason: str
) -> None:
    pieces = gemma_like()
    (tmp_path / "source").write_bytes(serialize(pieces, **changes))  # type: ignore[arg-type]
    with pytest.raises(CheckpointError, match=f"not Gemma's kind.*{reason}"):
        write_tokenizer(tmp_path / "source", tmp_path, context_length=512, vocab_size=len(pieces))


def test_a_tokenizer_that_normalizes_is_refused(tmp_path: Path) -> None:
    normalizer = sentencepiece.SentencePieceNormalizer(rule_name="nfkc").serialized_model_proto()
    # Appending one message to another joins them.
    (tmp_path / "source").write_bytes(TOKENIZER.read_bytes() + normalizer)
    with pytest.raises(CheckpointError, match="normalizes text"):
        write_tokenizer(tmp_path / "source", tmp_path, context_length=512, vocab_size=2048)


def test_a_tokenizer_without_byte_fallback_is_refused(tmp_path: Path) -> None:
    pieces = [*CONTROL, *UNKNOWN, *normal("a", "▁")]
    (tmp_path / "source").write_bytes(serialize(pieces, byte_fallback=False))
    with pytest.raises(CheckpointError, match="no byte fallback"):
        write_tokenizer(tmp_path / "source", tmp_path, context_length=512, vocab_size=len(pieces))


def test_unused_pieces_that_others_merge_into_are_refused(tmp_path: Path) -> None:
    size = write_model(tmp_path / "source", gemma_like(Piece("ab", 0.0, PieceKind.UNUSED)))
    with pytest.raises(CheckpointError, match="merge into unused ones"):
        write_tokenizer(tmp_path / "source", tmp_path, context_length=512, vocab_size=size)


def test_the_gate_finds_a_piece_that_is_cut_otherwise(tmp_path: Path) -> None:
    size = write_model(tmp_path / "source", gemma_like(*user_defined("▁q▁")))
    with pytest.raises(CheckpointError, match=r"cannot be written as tokenizer\.json: .*▁q▁.* becomes"):
        write_tokenizer(tmp_path / "source", tmp_path, context_length=512, vocab_size=size)


@pytest.mark.parametrize("broken", ["_merges", "_space_merges"])
def test_the_gate_finds_missing_merges(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: str) -> None:
    monkeypatch.setattr(files, broken, lambda model: iter(()))
    with pytest.raises(CheckpointError, match="cannot be written"):
        write_tokenizer(TOKENIZER, tmp_path, context_length=512, vocab_size=2048)


def test_a_missing_tokenizer_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no tokenizer: .*nowhere"):
        write_tokenizer(tmp_path / "nowhere", tmp_path, context_length=512, vocab_size=2048)
    with pytest.raises(CheckpointError, match="cannot be read"):
        write_tokenizer(tmp_path, tmp_path, context_length=512, vocab_size=2048)


def test_a_pointer_is_not_the_file(tmp_path: Path) -> None:
    (tmp_path / "source").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    with pytest.raises(CheckpointError, match="git lfs pull"):
        write_tokenizer(tmp_path / "source", tmp_path, context_length=512, vocab_size=2048)


def test_a_file_too_large_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "_MAX_BYTES", 1000)
    with pytest.raises(CheckpointError, match="too large"):
        write_tokenizer(TOKENIZER, tmp_path, context_length=512, vocab_size=2048)


def test_a_damaged_tokenizer_is_one_error_and_prints_nothing(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    whole = TOKENIZER.read_bytes()
    damaged = [b"", b"{}", b"\0" * 100, *(whole[:length] for length in range(1, len(whole), 1501))]
    for data in damaged:
        (tmp_path / "source").write_bytes(data)
        with pytest.raises(CheckpointError):
            write_tokenizer(tmp_path / "source", tmp_path, context_length=512, vocab_size=2048)
    assert capfd.readouterr() == ("", "")
