"""A loaded bundle: text in, text out; and the steps below that, for who measures it.

>>> session = load("bundle")
>>> for piece in session.generate("Once", max_new_tokens=32):
...     ...

Imports no torch and nothing of the other rooms.
"""

import os
from collections.abc import Sequence
from typing import Unpack

import numpy as np
import numpy.typing as npt

from gemma_export.errors import BundleError, PromptError, UsageError
from gemma_export.runtime.backend import Backend, Logits
from gemma_export.runtime.bundle import TOKENIZER_NAME, Bundle, Check, open_bundle
from gemma_export.runtime.chat import Conversation
from gemma_export.runtime.generate import (
    Completion,
    Generation,
    Row,
    check_drafts,
    run_rows,
)
from gemma_export.runtime.kv_cache import KVCache, check_room
from gemma_export.runtime.manifest import Manifest
from gemma_export.runtime.options import GenerationKeywords, GenerationOptions
from gemma_export.runtime.prompt_cache import PromptCache
from gemma_export.runtime.rolling_backend import RollingBackend
from gemma_export.runtime.saved_cache import load_cache, save_cache
from gemma_export.runtime.tokenizer import BOS_PIECE, Tokenizer

_LOGITS_CHUNK = 256  # tokens per run: [256, V] of float32 is 262 MB at V = 256,000


def load(path: str | os.PathLike[str], *, threads: int | None = None, verify: Check = "quick") -> "Session":
    """Loads a bundle, after checking it.

    Args:
        path: The bundle's folder.
        threads: Threads within an operator; None takes one per physical core.
        verify: How much is checked before anything is mapped, as `open_bundle` says: `quick` hashes all
            but the weights, `full` everything, `sizes` nothing.

    Raises:
        BundleError: It is damaged, unsafe, of a newer format, or cannot be loaded.
        DeviceError: The device that it was built for is not here.
        MissingDependencyError: onnxruntime or TensorRT is not installed, or a library that it needs.
        UsageError: `threads` is below 1.
    """
    bundle = open_bundle(path, check=verify)
    return Session(bundle, _backend(bundle, threads))


def _backend(bundle: Bundle, threads: int | None) -> Backend:
    """What runs a bundle's target.

    Imported only here: what needs no graph (reading a manifest, a tokenizer) does not need a runtime either.
    """
    if bundle.manifest.target == "cuda":
        from gemma_export.runtime.onnxruntime_cuda import CudaBackend

        return CudaBackend(bundle)
    if bundle.manifest.engines or bundle.manifest.target in ("rtx", "tensorrt"):
        from gemma_export.runtime.tensorrt import TensorRTBackend

        return TensorRTBackend(bundle)
    from gemma_export.runtime.onnxruntime import OnnxRuntimeBackend

    return OnnxRuntimeBackend(bundle, threads)


class Session:
    """A bundle and the backend that runs it.

    Attributes:
        bundle: The bundle on disk.
        tokenizer: Its tokenizer.

    Raises:
        BundleError: The tokenizer and the manifest disagree.
    """

    def __init__(self, bundle: Bundle, backend: Backend) -> None:
        self.bundle = bundle
        self._backend = backend if bundle.manifest.graph.rolling is None else RollingBackend(backend)
        self.tokenizer = Tokenizer(bundle.file(TOKENIZER_NAME), self.manifest.model.vocab_size)
        if self.tokenizer.bos != self.manifest.tokens.bos:
            raise BundleError(
                f"The tokenizer's {BOS_PIECE} is {self.tokenizer.bos}, "
                f"the manifest says {self.manifest.tokens.bos}.",
                "Build the bundle again from a checkpoint that has its own tokenizer.model.",
            )

    def __repr__(self) -> str:
        manifest = self.manifest
        return f"<Session of {manifest.model.name}, {manifest.precision}, {self.bundle.path}>"

    @property
    def manifest(self) -> Manifest:
        """What the bundle says of itself."""
        return self.bundle.manifest

    @property
    def max_length(self) -> int:
        """Tokens that a prompt and its continuation may have together."""
        return self.manifest.graph.max_length

    def generate(
        self, prompt: str, *, prompt_cache: PromptCache | None = None, **options: Unpack[GenerationKeywords]
    ) -> Generation:
        """Continues a text: `str()` of the result is the continuation, iterating it streams it.

        Args:
            prompt: The text; the beginning-of-sequence token is put in front.
            prompt_cache: What it holds of the prompt is not run again; afterwards it holds the prompt and its
                continuation. What was being generated over it ends where it stands.
            options: The fields of `GenerationOptions`: `max_new_tokens`, `temperature`, `stop`, …

        Raises:
            PromptError: The prompt is empty or cannot be encoded.
            ContextFullError: It does not fit into the cache.
            UsageError: An option is out of range.
        """
        tokens = self.tokenizer.encode(prompt)
        settled = GenerationOptions.of(options, self.manifest.tokens.stop)
        prompt_cache = prompt_cache or self.new_prompt_cache()
        return prompt_cache.generate(self._backend, self.tokenizer, tokens, settled)

    def new_prompt_cache(self) -> PromptCache:
        """An empty cache to keep from one prompt to the next."""
        return PromptCache(self._backend.new_cache(1))

    def read(self, prompt: str, prompt_cache: PromptCache) -> None:
        """Reads a prompt, or the rest of it, into a cache that is to be saved or to be gone on with.

        Raises:
            PromptError: The prompt is empty or cannot be encoded.
            ContextFullError: It does not fit into the cache, which is as it was.
        """
        prompt_cache.read(self._backend, self.tokenizer.encode(prompt), GenerationOptions.prefill_chunk)

    def save_cache(self, prompt_cache: PromptCache, path: str | os.PathLike[str]) -> None:
        """Writes a prompt cache to a file, whole or not at all; an older file is replaced.

        Raises:
            UsageError: There is nothing in it, or it lies on a device.
            StorageError: The disk refuses; an older file is as it was.
        """
        save_cache(prompt_cache, self.manifest, path)

    def load_cache(self, path: str | os.PathLike[str]) -> PromptCache:
        """Reads a prompt cache that this bundle has saved.

        Raises:
            UsageError: There is no such file, or this bundle's caches lie on a device.
            SavedCacheError: It is damaged, of a newer format, or of another bundle.
        """
        return load_cache(path, self.manifest, self._backend.new_cache(1))

    def generate_tokens(self, tokens: Sequence[int], **options: Unpack[GenerationKeywords]) -> list[int]:
        """The ids that continue `tokens`, which are taken as they are: nothing is put in front.

        Args:
            tokens: At least one id.
            options: As for `generate`; the stop token is not part of the result, and `stop_tokens=()`
                goes on past all of them.

        Raises:
            PromptError: There is no token, or one is outside the vocabulary.
            ContextFullError: They do not fit into the cache.
            UsageError: An option is out of range.
        """
        return list(self.generate_tokens_batch([tokens], **options)[0].tokens)

    def generate_batch(
        self, prompts: Sequence[str], **options: Unpack[GenerationKeywords]
    ) -> list[Completion]:
        """Continues several texts of any lengths together; each gets what it would get alone.

        Args:
            prompts: The texts; at least one.
            options: As for `generate`; each text has a random generator of its own with the same seed.

        Raises:
            PromptError: A prompt is empty or cannot be encoded.
            ContextFullError: One does not fit into the cache; none was run.
            UsageError: An option is out of range, or there is no prompt.
        """
        return self.generate_tokens_batch([self.tokenizer.encode(prompt) for prompt in prompts], **options)

    def generate_tokens_batch(
        self, prompts: Sequence[Sequence[int]], **options: Unpack[GenerationKeywords]
    ) -> list[Completion]:
        """As `generate_batch`, from ids that are taken as they are.

        Raises:
            PromptError: A prompt has no token, or one outside the vocabulary.
            ContextFullError: One does not fit into the cache; none was run.
            UsageError: An option is out of range, or there is no prompt.
        """
        if not prompts:
            raise UsageError("There is no prompt.", "Give at least one.")
        settled = GenerationOptions.of(options, self.manifest.tokens.stop)
        rows = [self._row(self._checked(prompt).tolist(), settled) for prompt in prompts]
        cache = self._backend.new_cache(len(rows))
        for _ in run_rows(self._backend, cache, rows, settled.prefill_chunk):
            pass
        return [row.completion() for row in rows]

    def chat(self, prompt_cache: PromptCache | None = None) -> Conversation:
        """A dialogue with the model, which must be an instruction-tuned one to make sense of it.

        Args:
            prompt_cache: Of a dialogue that goes on; None begins one.

        Raises:
            BundleError: The tokenizer has no turn tokens.
        """
        prompt_cache = prompt_cache or self.new_prompt_cache()
        return Conversation(self._backend, self.tokenizer, self.manifest.tokens.stop, prompt_cache)

    def count_tokens(self, text: str) -> int:
        """Tokens of a prompt, with the beginning-of-sequence token.

        Raises:
            PromptError: The text is empty or cannot be encoded.
        """
        return len(self.tokenizer.encode(text))

    def logits(self, tokens: Sequence[int]) -> Logits:
        """The logits after every token: float32 [T, V].

        Raises:
            UsageError: The bundle gives the last token's logits only.
            PromptError: There is no token, or one is outside the vocabulary.
            ContextFullError: They do not fit into the cache.
        """
        if not self._backend.gives_tail:
            raise UsageError(
                "This bundle gives the logits of the last token only.", "Build it with `--logits all`."
            )
        ids = self._checked(tokens)[None]
        cache = self.new_cache()
        cache.require(ids.size)
        logits = np.empty((ids.size, self.manifest.model.vocab_size), np.float32)
        for start in range(0, ids.size, _LOGITS_CHUNK):
            block = ids[:, start : start + _LOGITS_CHUNK]
            logits[start : start + block.size] = self._run(block, cache, tail=block.size)[0]
        return logits

    def new_cache(self, batch: int = 1) -> KVCache:
        """An empty cache for `step`.

        Raises:
            UsageError: `batch` is below 1.
        """
        if batch < 1:
            raise UsageError(f"batch is {batch}.", "Use at least 1.")
        return self._backend.new_cache(batch)

    def step(self, tokens: npt.ArrayLike, cache: KVCache) -> Logits:
        """Runs tokens behind those that the cache holds.

        Args:
            tokens: Whole numbers [B, T], one row per row of the cache. T is the same for all; rows of
                different lengths are run one at a time through `cache.row(index)`.
            cache: From `new_cache`; it holds T more tokens per row afterwards.

        Returns:
            float32 [B, 1, V], or [B, T, V] where the bundle was built with `--logits all`; a copy.

        Raises:
            PromptError: The tokens are not [B, T] of at least one, or one is outside the vocabulary.
            UsageError: B is not the cache's.
            ContextFullError: They do not fit into the cache; nothing was run.
        """
        ids = self._checked(tokens, dimensions=2)
        if len(ids) != cache.batch:
            raise UsageError(
                f"There are {len(ids)} rows of tokens; the cache has {cache.batch}.",
                "Give one row of tokens per row of the cache: [B, T].",
            )
        cache.require(ids.shape[1])
        return self._run(ids, cache).copy()

    def _run(self, ids: npt.NDArray[np.int64], cache: KVCache, tail: int = 1) -> Logits:
        positions = cache.lengths[:, None] + np.arange(ids.shape[1], dtype=np.int64)
        logits = self._backend.run(ids, positions, cache, tail)
        cache.advance(ids.shape[1])
        return logits

    def _row(self, tokens: list[int], options: GenerationOptions) -> Row:
        check_room(self.max_length, 0, len(tokens))
        check_drafts(self._backend, options)
        return Row(tokens, options, self.tokenizer, self.max_length)

    def _checked(self, tokens: npt.ArrayLike, dimensions: int = 1) -> npt.NDArray[np.int64]:
        """The tokens as int64 [T] or [B, T], all of them in the vocabulary."""
        try:
            ids = np.asarray(tokens)
        except ValueError:  # rows of different lengths
            ids = np.empty((), object)
        if ids.ndim == dimensions and not ids.size:
            bos = self.tokenizer.bos
            raise PromptError("There is no token.", f"Give at least one: {BOS_PIECE} is {bos}.")
        if ids.ndim != dimensions or ids.dtype.kind not in "iu":
            shape = "[T]" if dimensions == 1 else "[B, T]"
            raise PromptError(
                f"The tokens are not whole numbers {shape}.", "Give ids, or use `generate` for a text."
            )
        vocabulary = self.manifest.model.vocab_size
        outside = ids[(ids < 0) | (ids >= vocabulary)]
        if outside.size:
            raise PromptError(
                f"Token {outside[0]} is outside the vocabulary of {vocabulary}.",
                "Were the ids made with another model's tokenizer?",
            )
        return ids.astype(np.int64)
