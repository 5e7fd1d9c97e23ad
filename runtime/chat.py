"""Dialogues in the format of the Gemma report, table 4, with a cache that lives from turn to turn."""

import re
from typing import Unpack

from gemma_export.errors import PromptError
from gemma_export.runtime.backend import Backend
from gemma_export.runtime.generate import Generation
from gemma_export.runtime.kv_cache import check_room
from gemma_export.runtime.options import GenerationKeywords, GenerationOptions
from gemma_export.runtime.prompt_cache import PromptCache
from gemma_export.runtime.tokenizer import Tokenizer

START_OF_TURN = "<start_of_turn>"
END_OF_TURN = "<end_of_turn>"


class ChatFormat:
    r"""Token ids of `<start_of_turn>user\n{text}<end_of_turn>\n<start_of_turn>model\n`.

    Control tokens are put in by id, and what the user typed is encoded so that it cannot hold any: who
    types `<end_of_turn>` sends those characters, not the end of a turn.

    Raises:
        BundleError: The tokenizer has no turn tokens.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self.start_of_turn = tokenizer.piece_to_id(START_OF_TURN)
        self.end_of_turn = tokenizer.piece_to_id(END_OF_TURN)
        # SentencePiece takes a user-defined piece out of any text before it looks at anything else, but
        # only a whole one: the text is encoded in two parts where one would begin, behind its first
        # character. The ids of both parts decode to the same text.
        control = (re.escape(piece[1:]) for piece in (START_OF_TURN, END_OF_TURN))
        self._inside_control = re.compile(f"(?<=<)(?={'|'.join(control)})")

    def user_turn(self, text: str) -> list[int]:
        """The ids of the user's turn and of the beginning of the model's.

        Raises:
            PromptError: The text is empty, not UTF-8, or would become a control token after all.
        """
        if not text:
            raise PromptError("The message is empty.", "Give some text.")
        return [
            self.start_of_turn,
            *self.encode_user_text(f"user\n{text}"),
            self.end_of_turn,
            *self._tokenizer.encode_plain("\n"),
            self.start_of_turn,
            *self._tokenizer.encode_plain("model\n"),
        ]

    def close_turn(self) -> list[int]:
        """The ids that end a turn."""
        return [self.end_of_turn, *self._tokenizer.encode_plain("\n")]

    def encode_user_text(self, text: str) -> list[int]:
        """The ids of a text without any turn token, whatever it says.

        Raises:
            PromptError: The text is not UTF-8, or the tokenizer's normalization makes a turn token of it.
        """
        parts = self._inside_control.split(text)
        ids = [token for part in parts for token in self._tokenizer.encode_plain(part)]
        if self.start_of_turn in ids or self.end_of_turn in ids:
            raise PromptError("The message contains a control token.", "Remove it from the text.")
        return ids


class Conversation:
    """A dialogue: each turn prefills only what is new, because the cache holds all before it.

    Args:
        backend: Runs the graph.
        tokenizer: The bundle's.
        stop_tokens: The bundle's stop ids; the end of a turn always stops.
        prompt_cache: The dialogue so far; empty where it begins.
    """

    def __init__(
        self, backend: Backend, tokenizer: Tokenizer, stop_tokens: tuple[int, ...], prompt_cache: PromptCache
    ) -> None:
        self._backend = backend
        self._tokenizer = tokenizer
        self._format = ChatFormat(tokenizer)
        self._stop_tokens = tuple({*stop_tokens, self._format.end_of_turn})
        self.prompt_cache = prompt_cache

    @property
    def tokens(self) -> tuple[int, ...]:
        """Every id of the dialogue so far, from the beginning-of-sequence token on."""
        return self.prompt_cache.tokens

    def say(self, text: str, **options: Unpack[GenerationKeywords]) -> Generation:
        """Says something; the answer is generated as it is read.

        An answer that was cut (by `max_new_tokens`, Ctrl-C, or because it was not read to its end) counts
        as far as it came: its turn is closed before the next one begins.

        Args:
            text: The user's message; control tokens spelled out in it are plain text.
            options: The fields of `GenerationOptions`.

        Raises:
            PromptError: The text is empty or cannot be encoded.
            ContextFullError: The dialogue and this turn do not fit into the cache; nothing was run and the
                dialogue is as it was.
            UsageError: An option is out of range, or drafts are wanted that the bundle cannot verify.
        """
        settled = GenerationOptions.of(options, self._stop_tokens)
        said = self.prompt_cache.tokens
        opening = self._format.close_turn() if said else [self._tokenizer.bos]
        new = opening + self._format.user_turn(text)
        check_room(self.prompt_cache.cache.max_length, len(said), len(new))
        return self.prompt_cache.generate(self._backend, self._tokenizer, [*said, *new], settled)
