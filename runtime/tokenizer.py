"""The bundle's SentencePiece tokenizer: text to ids and back, and back piece by piece while text streams.

Control tokens are looked up by their piece, never by a number.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path

import sentencepiece

from gemma_export.errors import BundleError, PromptError

BOS_PIECE = "<bos>"
REPLACEMENT = "\N{REPLACEMENT CHARACTER}"

_OTHER_TOKENIZER = "Build the bundle again from a checkpoint that has its own tokenizer.model."


class Tokenizer:
    """Text to ids and back, as SentencePiece does it.

    Args:
        path: A `tokenizer.model`.
        vocab_size: The model's vocabulary. It may be larger than the tokenizer's: a padded embedding has
            rows that no piece names.

    Raises:
        BundleError: It cannot be read, has more pieces than the model has rows, or treats spaces in
            another way than Gemma's.
    """

    def __init__(self, path: Path, vocab_size: int) -> None:
        try:
            self._model = sentencepiece.SentencePieceProcessor(model_file=str(path))
        except (OSError, RuntimeError) as error:
            raise BundleError(f"{path} is not a SentencePiece model: {error}", _OTHER_TOKENIZER) from error
        self.size: int = self._model.get_piece_size()
        if self.size > vocab_size:
            raise BundleError(
                f"{path} has {self.size} pieces, the model {vocab_size} embeddings.", _OTHER_TOKENIZER
            )
        self._unknown: int = self._model.unk_id()
        self.bos: int = self.piece_to_id(BOS_PIECE)
        # Gemma's pieces carry their own spaces. A tokenizer that puts one before the text or drops some
        # could neither stream nor be fed a conversation turn by turn.
        if self.decode(self.encode_plain(" a  b ")) != " a  b ":
            raise BundleError(f"{path} does not keep spaces as Gemma's tokenizer does.", _OTHER_TOKENIZER)

    def piece_to_id(self, piece: str) -> int:
        """The id of a piece.

        Raises:
            BundleError: The tokenizer has no such piece.
        """
        token: int = self._model.piece_to_id(piece)
        if token == self._unknown:
            raise BundleError(f"The tokenizer has no piece {piece!r}.", _OTHER_TOKENIZER)
        return token

    def encode(self, text: str) -> list[int]:
        """The ids of a prompt, with the beginning-of-sequence token in front, once.

        A prompt that spells `<bos>` out at its start does not get a second one. Pieces such as
        `<start_of_turn>` that are spelled out become their tokens.

        Raises:
            PromptError: The text is empty, or has characters that no UTF-8 text can have.
        """
        if not text:
            raise PromptError(
                "The prompt is empty.",
                f"Give some text, or {BOS_PIECE} alone to let the model begin.",
            )
        return [self.bos, *self.encode_plain(text.removeprefix(BOS_PIECE))]

    def encode_plain(self, text: str) -> list[int]:
        """The ids of the text and nothing else.

        Raises:
            PromptError: The text has characters that no UTF-8 text can have.
        """
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise PromptError(
                f"The text is not valid UTF-8: character {error.start} is half of a surrogate pair.",
                "It was probably read in another encoding; read it as the encoding it has.",
            ) from None
        ids: list[int] = self._model.encode(text)
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids; control tokens have none, and a byte that begins no character is U+FFFD."""
        text: str = self._model.decode([self._known(token) for token in ids])
        return text

    def byte_of(self, token: int) -> int | None:
        """The byte that a byte-fallback piece stands for; None for every other piece."""
        token = self._known(token)
        if not self._model.is_byte(token):
            return None
        piece: str = self._model.id_to_piece(token)  # "<0xE2>"
        return int(piece[3:-1], 16)

    def _known(self, token: int) -> int:
        """The token, or the unknown one where the embedding is padded beyond the tokenizer's pieces."""
        return token if 0 <= token < self.size else self._unknown


class StreamDecoder:
    """Decodes ids as they come; the concatenation of what it gives is `Tokenizer.decode` of all ids.

    A character that byte-fallback pieces spell over several tokens is given whole, with its last byte.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._bytes = bytearray()

    def push(self, token: int) -> str:
        """The text that this token completes; may be empty."""
        byte = self._tokenizer.byte_of(token)
        if byte is None:
            return self.flush() + self._tokenizer.decode([token])
        self._bytes.append(byte)
        return self._take_characters(final=False)

    def flush(self) -> str:
        """What is left when no token follows: each byte of an unfinished character is U+FFFD."""
        return self._take_characters(final=True)

    def decode_all(self, tokens: Iterable[int]) -> str:
        """Pushes all, then flushes."""
        return "".join(self.push(token) for token in tokens) + self.flush()

    def _take_characters(self, *, final: bool) -> str:
        """Removes the characters that are decided from the front of the bytes.

        SentencePiece replaces one byte at a time, unlike Python's `errors="replace"`, which may replace
        the beginning of a character as a whole.
        """
        text = ""
        while self._bytes:
            size = _utf8_size(self._bytes[0])
            head = bytes(self._bytes[:size])
            try:
                text += head.decode("utf-8")
            except UnicodeDecodeError as error:
                if not final and error.reason == "unexpected end of data":
                    break
                size = 1
                text += REPLACEMENT
            del self._bytes[:size]
        return text


def _utf8_size(first: int) -> int:
    """The number of bytes of the character that begins with this byte; 1 where it begins none."""
    if first >= 0xF0:
        return 4
    if first >= 0xE0:
        return 3
    return 2 if first >= 0xC0 else 1
