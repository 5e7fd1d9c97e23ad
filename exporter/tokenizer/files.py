"""Writes a bundle's tokenizer: `tokenizer.model` itself, and the same tokenizer as `tokenizer.json`.

The project's own runtime reads `tokenizer.model`. Other clients (onnxruntime-genai, transformers) read
`tokenizer.json`, so it is made here from the pieces and cuts every text as SentencePiece does:

- A merge is any pair of normal pieces whose joint is a normal piece; it ranks by the joint's score.
- SentencePiece takes user-defined pieces out of a text first, the longest one at each place, and merges them
  with nothing. They are added tokens here. Runs of spaces are not, because added tokens are looked for in the
  raw text, where a space is no `▁` yet: they are merges that rank before all others.

Differences remain:

- Control tokens spelled out in a text (`<bos>`, `<eos>`, `<pad>`) become control tokens, because chat
  templates rely on that. SentencePiece reads them as plain characters, and so does the project's runtime.
- onnxruntime-genai reads a text up to its first NUL character. It cuts it before each space before it merges,
  so it never finds a piece with a space inside. It merges all pairs of one rank at once, so it may cut a run
  of more spaces than the longest piece has (Gemma: 31) at other places. It puts `<bos>` before a text only if
  told to, by `tokenizer.update_options(add_special_tokens=True)`; the chat template does it by itself.

Sources: google/sentencepiece `src/bpe_model.cc`; Gemma report (arXiv 2403.08295) section 2 and table 4.
"""

import json
from collections.abc import Container, Iterator
from dataclasses import dataclass
from pathlib import Path

import sentencepiece
from tokenizers import AddedToken, Tokenizer, decoders, normalizers, processors
from tokenizers.models import BPE

from gemma_export.errors import CheckpointError
from gemma_export.exporter.tokenizer import sentencepiece_model
from gemma_export.exporter.tokenizer.sentencepiece_model import PieceKind, SentencePieceModel

TOKENIZER_MODEL = "tokenizer.model"
TOKENIZER_JSON = "tokenizer.json"
TOKENIZER_CONFIG = "tokenizer_config.json"
START_OF_TURN = "<start_of_turn>"
END_OF_TURN = "<end_of_turn>"

# Gemma has two roles and no system prompt; the line end after `model` belongs to the prompt.
CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{% if message['role'] == 'user' %}{% set role = 'user' %}"
    "{% elif message['role'] in ['assistant', 'model'] %}{% set role = 'model' %}"
    "{% else %}{{ raise_exception('Gemma knows the roles user and assistant only.') }}{% endif %}"
    f"{{{{ '{START_OF_TURN}' + role + '\\n' + message['content'] + '{END_OF_TURN}\\n' }}}}"
    "{% endfor %}"
    f"{{% if add_generation_prompt %}}{{{{ '{START_OF_TURN}model\\n' }}}}{{% endif %}}"
)

_MAX_BYTES = 64 << 20  # Gemma's is 4 MB; what is larger is some other file and is not read.
_HINT = (
    "Put the tokenizer.model that belongs to the checkpoint (SentencePiece, about 4 MB) beside its weights."
)

_SAMPLES = (
    "The quick brown fox jumps over the lazy dog; it didn't stop.",
    " leading,  two   three     five and trailing  ",
    "1234567890 3.14159 0x1F 2+2=4",
    "def f(x):\n    if x:\n\treturn [x, 'y']\n\n\n    return {}\r\n",
    "naïve café, cafe\u0301, Straße, Ελληνικά, русский, עברית, العربية, हिन्दी, 你好世界, 日本語",
    "😀 👩‍👩‍👧 🇺🇳 \U000e0041 \ufeff \u200b \x01",
    "<0x0A> ▁ ▁▁x </s> <unk>",
)


@dataclass(frozen=True)
class TokenizerFacts:
    """The ids that a bundle's other files repeat; all are looked up by piece, none is assumed.

    Args:
        pieces: Number of pieces: the vocabulary's size.
        bos: Begins every sequence.
        eos: Ends a sequence.
        pad: Fills; never seen by the model.
        stop_ids: End a generation: `eos` and, in a chat vocabulary, the end of a turn.
        start_of_turn: Begins a turn of a dialogue; None where the vocabulary has no turns.
        end_of_turn: Ends it.
    """

    pieces: int
    bos: int
    eos: int
    pad: int
    stop_ids: tuple[int, ...]
    start_of_turn: int | None
    end_of_turn: int | None


def write_tokenizer(
    model_path: Path, folder: Path, *, context_length: int, vocab_size: int
) -> TokenizerFacts:
    """Writes `tokenizer.model`, `tokenizer.json` and `tokenizer_config.json`, and checks that they agree.

    Args:
        model_path: The checkpoint's SentencePiece model; links are followed.
        folder: An existing folder.
        context_length: The longest sequence, for `tokenizer_config.json`.
        vocab_size: Rows of the embedding table. There must be one for each piece and no more: a longer table
            has tokens that this tokenizer does not know (a fine-tune that added some), or is another model's.

    Raises:
        CheckpointError: There is no tokenizer, it is damaged, it is not Gemma's kind, its size is not
            `vocab_size`, or `tokenizer.json` cannot say the same.
        OSError: The folder cannot be written.
    """
    data = _read(model_path)
    model, processor = _parse(model_path, data)
    _check_kind(model_path, model)
    facts = _facts(model_path, model, processor)
    if facts.pieces != vocab_size:
        raise CheckpointError(
            f"{model_path} has {facts.pieces} pieces; the embedding table has {vocab_size} rows.",
            _HINT,
        )
    (folder / TOKENIZER_MODEL).write_bytes(data)
    built = _tokenizer(model, facts)
    (folder / TOKENIZER_JSON).write_text(built.to_str(), encoding="utf-8")
    settings = json.dumps(_tokenizer_config(model, facts, context_length), indent=2, ensure_ascii=False)
    (folder / TOKENIZER_CONFIG).write_text(settings + "\n", encoding="utf-8")
    _check_agreement(model_path, model, processor, Tokenizer.from_file(str(folder / TOKENIZER_JSON)))
    return facts


def _read(path: Path) -> bytes:
    try:
        if path.stat().st_size > _MAX_BYTES:
            raise CheckpointError(f"{path} is too large for a tokenizer.", _HINT)
        return path.read_bytes()
    except FileNotFoundError:
        raise CheckpointError(f"The checkpoint has no tokenizer: {path} does not exist.", _HINT) from None
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}.", _HINT) from None


def _parse(path: Path, data: bytes) -> tuple[SentencePieceModel, sentencepiece.SentencePieceProcessor]:
    try:
        # First our own reader: SentencePiece writes to the standard error stream what it dislikes.
        model = sentencepiece_model.parse_model(data)
        return model, sentencepiece.SentencePieceProcessor(model_proto=data)
    except (ValueError, RuntimeError) as error:
        if data.startswith(b"version https://git-lfs"):
            raise CheckpointError(
                f"{path} is a Git LFS pointer, not the file it points to.",
                "Run `git lfs pull` in its folder.",
            ) from None
        reason = str(error).rstrip(".")
        raise CheckpointError(
            f"{path} is damaged or is not a SentencePiece model: {reason}.", _HINT
        ) from None


def _check_kind(path: Path, model: SentencePieceModel) -> None:
    """Refuses what `tokenizer.json` would say differently."""
    normal = _normal_scores(model)
    unused = (model.pieces[index].text for index in model.ids(PieceKind.UNUSED))
    reasons = {
        "it is not byte-pair encoding": model.model_type != sentencepiece_model.BPE,
        "it normalizes text": model.normalizes,
        "it puts a space before every text": model.adds_dummy_prefix,
        "it removes spaces": model.removes_extra_whitespace,
        "it does not write spaces as ▁": not model.escapes_whitespace,
        "it has no byte fallback": not model.ids(PieceKind.BYTE),
        # SentencePiece cuts those up again, which byte-pair merges cannot say.
        "normal pieces merge into unused ones": any(next(_splits(text, normal), None) for text in unused),
    }
    for reason, holds in reasons.items():
        if holds:
            raise CheckpointError(f"{path} is not Gemma's kind of tokenizer: {reason}.", _HINT)


def _facts(
    path: Path, model: SentencePieceModel, processor: sentencepiece.SentencePieceProcessor
) -> TokenizerFacts:
    ids = {"bos": processor.bos_id(), "eos": processor.eos_id(), "pad": processor.pad_id()}
    missing = ", ".join(f"<{name}>" for name, index in ids.items() if index < 0)
    if missing:
        raise CheckpointError(f"{path} is not Gemma's kind of tokenizer: it has no {missing}.", _HINT)
    turns = {
        model.pieces[index].text: index for index in model.ids(PieceKind.USER_DEFINED, PieceKind.CONTROL)
    }
    start, end = turns.get(START_OF_TURN), turns.get(END_OF_TURN)
    stop_ids = (ids["eos"],) if end is None else (ids["eos"], end)
    return TokenizerFacts(len(model.pieces), **ids, stop_ids=stop_ids, start_of_turn=start, end_of_turn=end)


def _tokenizer(model: SentencePieceModel, facts: TokenizerFacts) -> Tokenizer:
    vocabulary = {piece.text: index for index, piece in enumerate(model.pieces)}
    unknown = model.pieces[model.ids(PieceKind.UNKNOWN)[0]].text
    bos = model.pieces[facts.bos].text
    tokenizer = Tokenizer(
        BPE(
            vocab=vocabulary,
            merges=[*_space_merges(model), *_merges(model)],
            unk_token=unknown,
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, facts.bos)]
    )
    control = [model.pieces[index].text for index in model.ids(PieceKind.CONTROL)]
    user_defined = [model.pieces[index].text for index in model.ids(PieceKind.USER_DEFINED)]
    turns = [piece for piece in user_defined if piece in (START_OF_TURN, END_OF_TURN)]
    plain = [piece for piece in user_defined if piece not in turns and "▁" not in piece]
    tokenizer.add_special_tokens(
        [AddedToken(piece, special=True, normalized=False) for piece in control + turns]
    )
    tokenizer.add_tokens([AddedToken(piece, special=False, normalized=False) for piece in plain])
    return tokenizer


def _space_merges(model: SentencePieceModel) -> Iterator[tuple[str, str]]:
    """The pairs that make runs of spaces, the first rank first: the longest joint has it.

    That grows one run at a time from the left, which is what taking the longest piece at each place comes to.
    Every split of a run is a merge, so that clients that join all pairs of one rank at once end with it too.
    """
    user_defined = {model.pieces[index].text for index in model.ids(PieceKind.USER_DEFINED)}
    longest = 1
    while "▁" * (longest + 1) in user_defined:
        longest += 1
    for length in range(longest, 1, -1):
        yield from (("▁" * cut, "▁" * (length - cut)) for cut in range(1, length))


def _merges(model: SentencePieceModel) -> Iterator[tuple[str, str]]:
    """All other pairs that may be joined, the first rank first."""
    normal = _normal_scores(model)
    for text in sorted(normal, key=normal.__getitem__, reverse=True):
        yield from _splits(text, normal)


def _normal_scores(model: SentencePieceModel) -> dict[str, float]:
    return {piece.text: piece.score for piece in model.pieces if piece.kind is PieceKind.NORMAL}


def _splits(text: str, pieces: Container[str]) -> Iterator[tuple[str, str]]:
    """Every way to cut a text into two pieces."""
    for cut in range(1, len(text)):
        if text[:cut] in pieces and text[cut:] in pieces:
            yield text[:cut], text[cut:]


def _tokenizer_config(
    model: SentencePieceModel, facts: TokenizerFacts, context_length: int
) -> dict[str, object]:
    settings: dict[str, object] = {
        "tokenizer_class": "GemmaTokenizer",
        "add_bos_token": True,
        "add_eos_token": False,
        "bos_token": model.pieces[facts.bos].text,
        "eos_token": model.pieces[facts.eos].text,
        "pad_token": model.pieces[facts.pad].text,
        "unk_token": model.pieces[model.ids(PieceKind.UNKNOWN)[0]].text,
        "clean_up_tokenization_spaces": False,
        "model_max_length": context_length,
    }
    if facts.start_of_turn is not None and facts.end_of_turn is not None:
        settings["chat_template"] = CHAT_TEMPLATE
    return settings


def _check_agreement(
    path: Path, model: SentencePieceModel, processor: sentencepiece.SentencePieceProcessor, written: Tokenizer
) -> None:
    """Compares both on texts that Gemma's peculiarities decide, and on every user-defined piece."""
    user_defined = [model.pieces[index].text for index in model.ids(PieceKind.USER_DEFINED)]
    for text in (*_SAMPLES, *(f"a {piece}\n{piece}b" for piece in user_defined)):
        expected = processor.encode(text)
        found = written.encode(text, add_special_tokens=False).ids
        if found != expected or written.decode(found, skip_special_tokens=False) != processor.decode(found):
            raise CheckpointError(
                f"{path} cannot be written as {TOKENIZER_JSON}: {text!r} becomes {found}, not {expected}.",
                _HINT,
            )
