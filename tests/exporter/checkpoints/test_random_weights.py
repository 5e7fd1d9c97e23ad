"""Random weights: as spread as a model's, and the same for the same seed however they are read."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.checkpoints import read_all

from gemma_export.exporter.checkpoints.checkpoint import Checkpoint, RandomCheckpoint
from gemma_export.exporter.config import GemmaConfig, preset


@pytest.fixture(scope="module")
def wide() -> GemmaConfig:
    """Wide enough that a tensor has several blocks, one of them not full."""
    return GemmaConfig("wide", 500, 256, 1, 4, 1, 32, 1100, 64)


@settings(max_examples=20, deadline=None)
@given(data=st.data())
def test_random_values_do_not_depend_on_the_split(data: st.DataObject, wide: GemmaConfig) -> None:
    tensor = RandomCheckpoint(wide, seed=3)["model.layers.0.mlp.up_proj.weight"]
    cuts = sorted(data.draw(st.lists(st.integers(0, 1100), max_size=4)))
    parts = [tensor.read(start, stop) for start, stop in zip([0, *cuts], [*cuts, 1100], strict=True)]
    assert torch.equal(torch.cat(parts), tensor.read(0, 1100))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_random_values_are_spread_as_weights_are(dtype: torch.dtype, wide: GemmaConfig) -> None:
    checkpoint = RandomCheckpoint(wide, seed=0, dtype=dtype)
    assert checkpoint.form == "random"
    assert checkpoint.config == wide
    for name, tensor in checkpoint.items():
        values = read_all(tensor)
        assert values.dtype == tensor.dtype == dtype
        assert tuple(values.shape) == tensor.shape
        assert values.isfinite().all()
        if name.endswith("proj.weight"):
            assert values.float().std().item() == pytest.approx(tensor.shape[1] ** -0.5, rel=0.02)
            assert abs(values.float().mean().item()) < 0.1 * tensor.shape[1] ** -0.5


def test_random_values_are_the_seed_s_and_each_tensor_s_own(wide: GemmaConfig) -> None:
    def values(seed: int, name: str) -> torch.Tensor:
        return RandomCheckpoint(wide, seed, torch.float32)[f"model.layers.0.mlp.{name}.weight"].read(0, 4)

    assert torch.equal(values(1, "up_proj"), values(1, "up_proj"))
    assert not torch.equal(values(1, "up_proj"), values(2, "up_proj"))
    assert not torch.equal(values(1, "up_proj"), values(1, "gate_proj"))
    # The values themselves, so that a seed means the same in every version and on every machine.
    pinned = [0.047886040061712265, 0.038074273616075516, 0.0835585817694664]
    assert values(1, "up_proj")[0, :3].tolist() == pinned


def test_the_digest_of_random_weights_is_of_what_makes_them(wide: GemmaConfig) -> None:
    def digest(config: GemmaConfig = wide, seed: int = 0, dtype: torch.dtype = torch.bfloat16) -> str:
        return RandomCheckpoint(config, seed, dtype).digest()

    assert digest() == digest()
    assert len({digest(), digest(seed=1), digest(dtype=torch.float16), digest(preset("2b"))}) == 4


def test_random_weights_are_a_checkpoint(wide: GemmaConfig) -> None:
    checkpoint: Checkpoint = RandomCheckpoint(wide)
    assert checkpoint.folder is checkpoint.tokenizer_path is None
    assert len(checkpoint) == 11
