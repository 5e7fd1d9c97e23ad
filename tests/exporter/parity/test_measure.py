"""Which checkpoint a bundle is held against when none is named, and what its manifest tells the report."""

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

from gemma_export.errors import CheckpointError
from gemma_export.exporter.config import tiny_folder
from gemma_export.exporter.events import ignore
from gemma_export.exporter.parity.measure import audit_range, source_of_bundle, what_is_quantized
from gemma_export.exporter.parity.reference import Reference
from gemma_export.exporter.parity.report import Quantized
from gemma_export.exporter.request import BuildRequest
from gemma_export.exporter.source import requested_source
from gemma_export.runtime.bundle import Manifest, open_bundle
from gemma_export.runtime.manifest import QuantizationInfo, QuantizedTensor

TOKENIZER = tiny_folder() / "tokenizer.model"


@pytest.fixture
def manifest(tiny_bundle: Path) -> Manifest:
    return open_bundle(tiny_bundle, check="sizes").manifest


def built_from(manifest: Manifest, **changes: str) -> Manifest:
    return replace(manifest, checkpoint=replace(manifest.checkpoint, **changes))


def test_its_own_checkpoint_comes_first(manifest: Manifest, tmp_path: Path) -> None:
    own = tmp_path / "fine-tuned"
    own.mkdir()
    for path in tiny_folder().iterdir():
        if path.is_file():
            (own / path.name).write_bytes(path.read_bytes())
    source = source_of_bundle(built_from(manifest, source=str(own)), None, TOKENIZER)
    assert source.checkpoint.folder == own


def test_what_ships_is_found_on_another_machine(manifest: Manifest) -> None:
    source = source_of_bundle(built_from(manifest, source="/nowhere/tiny"), None, TOKENIZER)
    assert source.checkpoint.folder == tiny_folder()


def test_other_weights_of_the_shipped_shape_are_not_what_ships(manifest: Manifest) -> None:
    gone = built_from(manifest, source="/nowhere/fine-tuned", digest="0" * 64)
    with pytest.raises(CheckpointError, match="is not at /nowhere/fine-tuned"):
        source_of_bundle(gone, None, TOKENIZER)


def test_random_weights_are_made_again(manifest: Manifest) -> None:
    source = source_of_bundle(built_from(manifest, source="random weights, seed 5"), None, TOKENIZER)
    assert source.checkpoint.source == "random weights, seed 5"


def test_a_named_checkpoint_wins(manifest: Manifest) -> None:
    named = built_from(manifest, source="random weights, seed 5")
    assert source_of_bundle(named, tiny_folder(), TOKENIZER).checkpoint.folder == tiny_folder()


def test_a_report_names_the_layers_that_keep_16_bits(manifest: Manifest) -> None:
    assert what_is_quantized(manifest) is None
    forms = {"embed_tokens": "w8", "layers.0.mlp.down_proj": "float", "layers.0.self_attn.o_proj": "w8"}
    tensors = {name: QuantizedTensor(form, "nearest", "", 8, None, 1, None) for name, form in forms.items()}
    kept = {"layers.0.mlp.down_proj": "it costs too much"}
    info = QuantizationInfo(None, 0, 0, kept, tensors)
    found = what_is_quantized(replace(manifest, scheme="w8a16", cache_dtype="int8", quantization=info))
    assert found == Quantized("w8a16", {"w8": 2, "float": 1}, kept, "int8")
    assert json.loads(json.dumps(asdict(found))) == asdict(found)


def test_the_range_audit_leaves_torchs_products_as_they_were(monkeypatch: pytest.MonkeyPatch) -> None:
    """What comes after it, the reference of the gate for one, is computed in fp32 again."""
    request = BuildRequest(size="tiny", target="onnx", precision="fp16")
    found: list[str] = []

    def run(self: Reference, *arguments: object, **options: object) -> None:
        found.append(torch.get_float32_matmul_precision())
        raise InterruptedError

    before = torch.get_float32_matmul_precision()
    monkeypatch.setattr(Reference, "run", run)
    with pytest.raises(InterruptedError):
        audit_range(request, requested_source(request), ignore)
    assert found == ["medium"]
    assert torch.get_float32_matmul_precision() == before == "highest"
