"""A text and its cache, kept from one generation to the next: what starts the same is not run again."""

from collections.abc import Sequence

from gemma_export.runtime.backend import Backend
from gemma_export.runtime.generate import Generation, Row, check_drafts, prefill, run_rows
from gemma_export.runtime.kv_cache import KVCache, check_room
from gemma_export.runtime.options import GenerationOptions
from gemma_export.runtime.tokenizer import Tokenizer


class PromptCache:
    """The tokens of a text, and the keys and values of the first of them.

    Args:
        cache: Of one row, from the backend that will run the text.
        tokens: At least those that the cache holds.
    """

    def __init__(self, cache: KVCache, tokens: Sequence[int] = ()) -> None:
        self.cache = cache
        self._tokens = list(tokens)
        self._generation: Generation | None = None

    @property
    def tokens(self) -> tuple[int, ...]:
        """The ids of the text, as far as it has been read and generated."""
        return tuple(self._tokens)

    def read(self, backend: Backend, tokens: Sequence[int], chunk: int) -> None:
        """Fills the cache with a text, in steps of `chunk` tokens, as far as it does not hold it yet.

        Raises:
            ContextFullError: It does not fit; the cache is as it was.
        """
        check_room(self.cache.max_length, 0, len(tokens))
        self._go_back_to_common(tokens)
        prefill(backend, self.cache, self._tokens, chunk)

    def generate(
        self, backend: Backend, tokenizer: Tokenizer, tokens: Sequence[int], options: GenerationOptions
    ) -> Generation:
        """Continues a text, which is run from where it differs from what the cache holds.

        What was being generated over this cache ends where it stands.

        Args:
            backend: Runs the graph.
            tokenizer: The bundle's.
            tokens: The ids of the whole text so far, at least one.
            options: With `stop_tokens` settled.

        Raises:
            ContextFullError: The text does not fit; the cache is as it was.
            UsageError: Drafts are wanted that the bundle cannot verify.
        """
        check_room(self.cache.max_length, 0, len(tokens))
        check_drafts(backend, options)
        self._go_back_to_common(tokens)
        row = Row(self._tokens, options, tokenizer, self.cache.max_length)
        steps = run_rows(backend, self.cache, [row], options.prefill_chunk)
        self._generation = Generation(row, steps, self.cache.length)
        return self._generation

    def _go_back_to_common(self, tokens: Sequence[int]) -> None:
        """Keeps of the cache what the text can go on from, which leaves one of its tokens to run."""
        if self._generation is not None:
            self._generation.close()
        held = self._tokens[: self.cache.length]
        pairs = zip(held, tokens[:-1], strict=False)
        common = next((place for place, (old, new) in enumerate(pairs) if old != new), None)
        if common is None:
            common = min(len(held), len(tokens) - 1)
        self.cache.truncate(self.cache.reusable(common))
        self._tokens = list(tokens)
