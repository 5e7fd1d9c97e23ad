"""The tokenizer: SentencePiece BPE with Gemma's settings and special ids, on a small vocabulary."""

import io
from collections.abc import Iterable

import sentencepiece as spm

VOCABULARY = 2048
PAD, EOS, BOS, UNK, MASK = 0, 1, 2, 3, 4
START_OF_TURN, END_OF_TURN = 106, 107
NEWLINE = 108
LONGEST_NEWLINES, LONGEST_SPACES = 4, 8  # Runs of each kept as one piece; Gemma goes up to 31.
FIRST_BYTE = NEWLINE + LONGEST_NEWLINES + LONGEST_SPACES - 1


def symbols() -> list[str]:
    """The user-defined pieces in the order of their ids, from <mask> to the longest run of spaces."""
    return [
        "<mask>",
        *(f"<unused{i}>" for i in range(START_OF_TURN - MASK - 1)),
        "<start_of_turn>",
        "<end_of_turn>",
        *("\n" * n for n in range(1, LONGEST_NEWLINES + 1)),
        *("▁" * n for n in range(2, LONGEST_SPACES + 1)),
    ]


def train_tokenizer(texts: Iterable[str]) -> bytes:
    """Learns the pieces and checks that every fixed id is where Gemma has it.

    Args:
        texts: The training part of each text.

    Returns:
        The contents of ``tokenizer.model``.
    """
    model = io.BytesIO()
    spm.SentencePieceTrainer.train(
        sentence_iterator=iter([line for text in texts for line in text.splitlines() if line]),
        model_writer=model,
        model_type="bpe",
        vocab_size=VOCABULARY,
        pad_id=PAD,
        eos_id=EOS,
        bos_id=BOS,
        unk_id=UNK,
        pad_piece="<pad>",
        eos_piece="<eos>",
        bos_piece="<bos>",
        unk_piece="<unk>",
        user_defined_symbols=symbols(),
        byte_fallback=True,
        split_digits=True,
        allow_whitespace_only_pieces=True,
        normalization_rule_name="identity",
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        character_coverage=1.0,
        max_sentence_length=100_000,
        num_threads=1,
        minloglevel=2,
    )
    check(model.getvalue())
    return model.getvalue()


def check(model: bytes) -> None:
    """Fails loudly unless the special pieces have Gemma's ids and text survives a round trip.

    Args:
        model: The contents of ``tokenizer.model``.
    """
    pieces = spm.SentencePieceProcessor(model_proto=model)
    assert pieces.get_piece_size() == VOCABULARY
    assert (pieces.pad_id(), pieces.eos_id(), pieces.bos_id(), pieces.unk_id()) == (PAD, EOS, BOS, UNK)
    for at, piece in enumerate(symbols(), start=MASK):
        assert pieces.id_to_piece(at) == piece, f"id {at} is {pieces.id_to_piece(at)!r}, not {piece!r}"
    assert pieces.piece_to_id("<start_of_turn>") == START_OF_TURN
    assert pieces.piece_to_id("<end_of_turn>") == END_OF_TURN
    assert pieces.encode("\n") == [NEWLINE]
    assert all(pieces.id_to_piece(FIRST_BYTE + byte) == f"<0x{byte:02X}>" for byte in range(256))
    for text in ("", " a  b ", "Thou\n\n\n art — “so”.\n", "naïve 日本 🎭 2048\t"):
        assert pieces.decode(pieces.encode(text)) == text
