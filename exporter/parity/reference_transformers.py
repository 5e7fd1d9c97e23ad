"""The independent reference: `transformers` runs the checkpoint, with the same interface as `Reference`.

It shares no line with this project's decoder, so agreement says that the decoder itself is right. It holds
the whole model in fp32 (2B: 10 GB, 7B: 34 GB), which is why it is the oracle and not the default.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gemma_export.errors import CheckpointError, MissingDependencyError, first_line
from gemma_export.exporter.parity.observation import Observe
from gemma_export.exporter.parity.reference import Positions, ReferenceRun, check_sequences, kept_positions


@dataclass(frozen=True)
class _Table:
    """A tensor in memory, read like a lazy one."""

    name: str
    tensor: Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.tensor.shape)

    @property
    def dtype(self) -> torch.dtype:
        return self.tensor.dtype

    def read(self, start: int, stop: int) -> Tensor:
        return self.tensor[start:stop].clone()


class TransformersReference:
    """`transformers`' own Gemma in fp32 with eager attention.

    Args:
        folder: A checkpoint in the Hugging Face form. Nothing is downloaded.

    Raises:
        MissingDependencyError: `transformers` is not installed.
        CheckpointError: It cannot load the folder.
    """

    def __init__(self, folder: Path | str) -> None:
        try:
            import transformers
        except ImportError as error:
            raise MissingDependencyError(
                "The transformers reference needs the package transformers, which is not installed.",
                'Install it: pip install "gemma-export[parity]"; or leave out --reference transformers.',
            ) from error
        self._new_cache = transformers.DynamicCache
        self.name = f"the checkpoint in fp32, by transformers {transformers.__version__}"
        try:
            self._model: Any = transformers.AutoModelForCausalLM.from_pretrained(
                str(folder), dtype=torch.float32, attn_implementation="eager", local_files_only=True
            )
        except (OSError, ValueError, KeyError, RuntimeError) as error:
            raise CheckpointError(
                f"transformers cannot load {folder}: {first_line(error)}",
                "It reads checkpoints in the Hugging Face form only; leave out `--reference transformers`.",
            ) from error

    @torch.inference_mode()
    def run(
        self,
        sequences: Sequence[Sequence[int]],
        *,
        observe: Observe | None = None,
        keep_cache: bool | Positions = True,
    ) -> ReferenceRun:
        """As `Reference.run`; the activations that are observed are those of modules of the same name."""
        table = self._model.get_output_embeddings().weight
        check_sequences(sequences, table.shape[0])
        kept = kept_positions(sequences, keep_cache)
        handles = self._hooks(observe) if observe is not None else []
        hidden: list[Tensor] = []
        caches: list[Any] = []
        try:
            for sequence in sequences:
                # Made of the configuration, it would forget what a local layer's window left behind.
                cache = self._new_cache()
                out = self._model.model(torch.tensor([sequence]), past_key_values=cache, use_cache=True)
                hidden.append(out.last_hidden_state[0])
                caches.append(out.past_key_values)
        finally:
            for handle in handles:
                handle.remove()
        layers = range(self._model.config.num_hidden_layers)
        chosen = [torch.tensor(positions, dtype=torch.int64) for positions in kept]
        kept_cache = [
            [
                (c.layers[i].keys[0][:, where], c.layers[i].values[0][:, where])
                for c, where in zip(caches, chosen, strict=True)
            ]
            for i in layers
        ]
        lengths = tuple(len(sequence) for sequence in sequences)
        cap = getattr(self._model.config, "final_logit_softcapping", None)
        return ReferenceRun(lengths, hidden, _Table("lm_head.weight", table), kept_cache, cap, observe)

    def _hooks(self, observe: Observe) -> list[Any]:
        def show(name: str) -> Any:
            return lambda module, args, output: observe(name, output.numpy())

        return [
            module.register_forward_hook(show(name))
            for name, module in self._model.model.named_modules()
            if isinstance(module, torch.nn.Linear) or name.endswith("norm")
        ]
