"""The canonical graph as the ONNX specification reads it: the checker, and the reference evaluator."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx.reference import ReferenceEvaluator
from support.oracle import FAMILIES, RELATIVE_ERROR, SLOTS, random_tokens, relative_error

from gemma_export.exporter.decoder import Decoder, rotary_tables
from gemma_export.exporter.pipeline import BuildResult
from gemma_export.exporter.source import Source, open_source

pytestmark = pytest.mark.slow

Run = Callable[[dict[str, Any]], dict[str, Any]]
each_family = pytest.mark.parametrize("family", FAMILIES)


@pytest.fixture
def graph(family: str, build_once: Callable[..., BuildResult], checkpoint_of: Callable[[str], Path]) -> Path:
    checkpoint = checkpoint_of(family)
    result = build_once(checkpoint=checkpoint, target="onnx", logits="all", max_length=SLOTS)
    return result.path / "model.onnx"


@pytest.fixture
def source(family: str, checkpoint_of: Callable[[str], Path]) -> Source:
    return open_source(checkpoint_of(family))


def by_the_specification(graph: Path) -> Run:
    evaluator = ReferenceEvaluator(str(graph))

    def run(feeds: dict[str, Any]) -> dict[str, Any]:
        return dict(zip(evaluator.output_names, evaluator.run(None, feeds), strict=True))

    return run


def by_onnxruntime(graph: Path) -> Run:
    session = onnxruntime.InferenceSession(graph, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]

    def run(feeds: dict[str, Any]) -> dict[str, Any]:
        return dict(zip(names, session.run(names, feeds), strict=True))

    return run


def by_the_decoder(source: Source) -> Run:
    """The module that was traced, eagerly, with the whole cache."""
    decoder = Decoder(source.config, SLOTS, all_logits=True).eval()
    state = {name: tensor.read(0, tensor.shape[0]).float() for name, tensor in source.weights.items()}
    state["rotary_cos"], state["rotary_sin"] = rotary_tables(source.config, SLOTS)
    decoder.load_state_dict(state)

    @torch.inference_mode()
    def run(feeds: dict[str, Any]) -> dict[str, Any]:
        ids, positions, *caches = (torch.from_numpy(array) for array in feeds.values())
        logits, presents = decoder(ids, positions, caches)
        names = [name.replace("past_key_values", "present") for name in list(feeds)[2:]]
        return dict(zip(["logits", *names], [logits.numpy(), *(p.numpy() for p in presents)], strict=True))

    return run


def steps(run: Run, source: Source, rows: int) -> list[dict[str, Any]]:
    """A prefill of nine tokens, three more on top of them, and one decoded: the outputs of each."""
    config = source.config
    shape = (rows, config.num_kv_heads, SLOTS, config.head_dim)
    caches = {
        f"past_key_values.{i}.{part}": np.zeros(shape, np.float32)
        for i in range(config.num_layers)
        for part in ("key", "value")
    }
    tokens = np.array([random_tokens(13, seed=row) for row in range(rows)], np.int64)
    found = []
    for start, stop in ((0, 9), (9, 12), (12, 13)):
        positions = np.broadcast_to(np.arange(start, stop), (rows, stop - start)).copy()
        outputs = run({"input_ids": tokens[:, start:stop], "position_ids": positions, **caches})
        caches = {name: outputs[name.replace("past_key_values", "present")] for name in caches}
        found.append(outputs)
    return found


@each_family
def test_the_checker_has_nothing_to_say(graph: Path) -> None:
    onnx.checker.check_model(str(graph), full_check=True)
    model = onnx.load(graph, load_external_data=False)
    assert {entry.domain: entry.version for entry in model.opset_import} == {"": 24}


@each_family
@pytest.mark.parametrize("rows", [1, 2])
def test_the_specification_onnxruntime_and_the_decoder_agree(graph: Path, source: Source, rows: int) -> None:
    specified = steps(by_the_specification(graph), source, rows)
    for other in (by_onnxruntime(graph), by_the_decoder(source)):
        for expected, outputs in zip(specified, steps(other, source, rows), strict=True):
            assert outputs.keys() == expected.keys()
            for name, values in outputs.items():
                assert relative_error(expected[name], values) < RELATIVE_ERROR, name
