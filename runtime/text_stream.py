"""New tokens to text that can be shown: whole characters only, and nothing of a stop string."""

from collections.abc import Sequence

from gemma_export.runtime.tokenizer import StreamDecoder, Tokenizer


class TextStream:
    """Decodes tokens as they come and ends at the first stop string.

    Text that may turn out to be the beginning of a stop string is held back until it cannot be one.

    Args:
        tokenizer: Decodes the tokens.
        stop: Strings that end the text, none of them empty.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str]) -> None:
        self._decoder = StreamDecoder(tokenizer)
        self._stop = tuple(stop)
        self._held = ""
        self.stopped = False

    def push(self, token: int) -> str:
        """The text that may be shown now that this token has come."""
        return self._filter(self._decoder.push(token))

    def flush(self) -> str:
        """The rest, when no token follows."""
        if self.stopped:
            return ""
        shown = self._filter(self._decoder.flush())
        held, self._held = self._held, ""  # empty where a stop string has come
        return shown + held

    def _filter(self, text: str) -> str:
        text = self._held + text
        found = [start for stop in self._stop if (start := text.find(stop)) >= 0]
        if found:
            self.stopped = True
            self._held = ""
            return text[: min(found)]
        keep = max((_overlap(text, stop) for stop in self._stop), default=0)
        shown, self._held = text[: len(text) - keep], text[len(text) - keep :]
        return shown


def _overlap(text: str, stop: str) -> int:
    """The length of the longest end of `text` that is a beginning of `stop`."""
    return next(size for size in range(min(len(text), len(stop)), -1, -1) if text.endswith(stop[:size]))
