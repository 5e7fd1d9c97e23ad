"""The TensorRT backend on a fake device, which computes with onnxruntime and enforces the rules."""

import gc
import sys
from pathlib import Path

import numpy as np
import pytest
from support.engine_bundle import (
    DECODE,
    PREFILL,
    FakeEngineFile,
    decode_batch,
    engine_manifest,
    on_cpu,
    write_engine_bundle,
)
from support.fake_device import FakeCudart, RuleBrokenError
from support.fake_tensorrt import CudaGraphStrategy, FakeContext, FakeTensorRT
from support.small_bundle import Shape, write_manifest

from gemma_export.errors import BundleError, ContextFullError
from gemma_export.runtime.bundle import open_bundle
from gemma_export.runtime.session import load

# A rule that is broken while memory is given back has nobody to raise it to.
pytestmark = pytest.mark.filterwarnings("error")

PROMPTS = ["Once upon a time there was", "a", "The quick brown fox jumps over the lazy dog, and", "Hello"]
TOKENS = [2, 651, 17, 1290, 9, 88, 402, 1011, 7, 30, 256, 3, 77]


def context(tensorrt: FakeTensorRT) -> FakeContext:
    return tensorrt.engines[-1].contexts[-1]


def profiles_run(tensorrt: FakeTensorRT) -> list[int]:
    return [profile for profile, _, _ in context(tensorrt).executed]


def test_text_is_that_of_onnxruntime(engine_bundle: Path, tensorrt: FakeTensorRT) -> None:
    session, reference = load(engine_bundle), on_cpu(engine_bundle)
    for prompt in PROMPTS:
        wanted = reference.generate(prompt, max_new_tokens=24)
        found = session.generate(prompt, max_new_tokens=24)
        assert found.tokens == wanted.tokens
        assert found.finish_reason == wanted.finish_reason


@pytest.mark.parametrize("count", [1, 2, 3, 4])
@pytest.mark.parametrize("batched", [False, True], ids=["one row", "4 rows"])
def test_ragged_batches_say_what_each_row_says_alone(
    engine_bundle: Path, batch_bundle: Path, tensorrt: FakeTensorRT, count: int, batched: bool
) -> None:
    session = load(batch_bundle if batched else engine_bundle)
    alone = [on_cpu(engine_bundle).generate(prompt, max_new_tokens=8).tokens for prompt in PROMPTS[:count]]
    found = session.generate_batch(PROMPTS[:count], max_new_tokens=8)
    assert [row.tokens for row in found] == alone


def test_more_rows_than_the_engine_holds(batch_bundle: Path, tensorrt: FakeTensorRT) -> None:
    prompts = [*PROMPTS, *PROMPTS[:2]]
    found = load(batch_bundle).generate_batch(prompts, max_new_tokens=6)
    assert found[4:] == found[:2]
    assert found == on_cpu(batch_bundle).generate_batch(prompts, max_new_tokens=6)
    batches = {shapes["input_ids"][0] for profile, shapes, _ in context(tensorrt).executed if profile == 2}
    assert batches == {4}


def test_a_dialogue_goes_on_in_its_cache(engine_bundle: Path, tensorrt: FakeTensorRT) -> None:
    texts = []
    for session in (load(engine_bundle), on_cpu(engine_bundle)):
        conversation = session.chat()
        texts.append([str(conversation.say(text, max_new_tokens=4)) for text in ("Hi", "Why", "So")])
    assert texts[0] == texts[1]


def test_a_cache_to_its_last_slot(engine_bundle: Path, tensorrt: FakeTensorRT) -> None:
    session, reference = load(engine_bundle), on_cpu(engine_bundle)
    found = session.generate_tokens(TOKENS, max_new_tokens=200, stop_tokens=())
    assert found == reference.generate_tokens(TOKENS, max_new_tokens=200, stop_tokens=())
    assert len(found) == session.max_length - len(TOKENS) + 1
    cache = session.new_cache()
    session.step([TOKENS * 4], cache)
    with pytest.raises(ContextFullError):
        session.step([TOKENS], cache)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_logits_and_caches_of_every_type(tmp_path: Path, tensorrt: FakeTensorRT, dtype: str) -> None:
    bundle = write_engine_bundle(tmp_path / "bundle", Shape(cache_dtype=dtype, logits="all"))
    session, reference = load(bundle), on_cpu(bundle)
    # The same operators over the same memory; only the chunks differ, and fp32 sums them in another order.
    np.testing.assert_allclose(session.logits(TOKENS), reference.logits(TOKENS), atol=1e-4)
    caches = session.new_cache(), reference.new_cache()
    for each, cache in zip((session, reference), caches, strict=True):
        each.step([TOKENS], cache)
    for layer in range(2):
        # One unit in the last place of a key of order 4, where fp32's error crosses a rounding boundary.
        tolerance = {"float32": 1e-5, "float16": 2**-8, "bfloat16": 2**-5}[dtype]
        np.testing.assert_allclose(caches[0].keys(layer), caches[1].keys(layer), atol=tolerance)
        np.testing.assert_allclose(caches[0].values(layer), caches[1].values(layer), atol=tolerance)
        assert caches[0].keys(layer).shape == (1, 2, len(TOKENS), 16)


def test_all_logits_of_several_rows_in_chunks(tmp_path: Path, tensorrt: FakeTensorRT) -> None:
    bundle = write_engine_bundle(tmp_path / "bundle", Shape(logits="all"))
    session, reference = load(bundle), on_cpu(bundle)
    rows = [TOKENS, TOKENS[::-1]]
    found = session.step(rows, session.new_cache(2))
    assert found.shape == (2, len(TOKENS), 2048)
    np.testing.assert_allclose(found, reference.step(rows, reference.new_cache(2)), atol=1e-4)


def test_all_logits_of_a_batch_that_is_run_token_by_token(tmp_path: Path, tensorrt: FakeTensorRT) -> None:
    shape, engine = Shape(logits="all"), FakeEngineFile((DECODE, decode_batch(2, 4)))
    bundle = write_engine_bundle(tmp_path / "bundle", shape, engine)
    session, reference = load(bundle), on_cpu(bundle)
    rows = [TOKENS[:3], TOKENS[3:6]]
    found = session.step(rows, session.new_cache(2))
    np.testing.assert_allclose(found, reference.step(rows, reference.new_cache(2)), atol=1e-4)
    assert profiles_run(tensorrt) == [1, 1, 1]


def test_more_rows_than_a_chunk_has_tokens(tmp_path: Path, tensorrt: FakeTensorRT) -> None:
    engine = FakeEngineFile((("prefill", (1, 1, 1), (1, 2, 2)), DECODE, decode_batch(4, 4)))
    bundle = write_engine_bundle(tmp_path / "bundle", Shape(logits="last"), engine)
    found = load(bundle).generate_batch(PROMPTS, max_new_tokens=4)
    assert found == on_cpu(bundle).generate_batch(PROMPTS, max_new_tokens=4)


def test_prefill_and_decode_take_their_profiles(engine_bundle: Path, tensorrt: FakeTensorRT) -> None:
    session = load(engine_bundle)
    cache = session.new_cache()
    session.step([TOKENS], cache)  # 13 tokens in chunks of 8
    for _ in range(3):
        session.step([[5]], cache)
    session.step([[5, 6]], cache)
    assert profiles_run(tensorrt) == [0, 0, 1, 1, 1, 0]
    assert [shapes["input_ids"] for _, shapes, _ in context(tensorrt).executed] == [
        (1, 8), (1, 5), (1, 1), (1, 1), (1, 1), (1, 2)
    ]  # fmt: skip
    assert len(tensorrt.engines[-1].contexts) == 1


def test_steps_of_the_same_size_are_not_told_again(
    engine_bundle: Path, tensorrt: FakeTensorRT, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = load(engine_bundle)
    cache = session.new_cache()
    session.step([[5]], cache)
    told: list[str] = []
    for name in ("set_optimization_profile_async", "set_input_shape", "set_tensor_address"):
        monkeypatch.setattr(FakeContext, name, lambda self, *_, name=name: bool(told.append(name)))
    session.step([[6]], cache)
    assert told == []


def test_past_and_present_are_one_address_and_stay(engine_bundle: Path, tensorrt: FakeTensorRT) -> None:
    session = load(engine_bundle)
    cache = session.new_cache()
    session.step([TOKENS], cache)
    session.step([[5]], cache)
    addresses = [buffer.address for buffer in (*cache.key_buffers, *cache.value_buffers)]
    assert len(set(addresses)) == 4
    for _, _, bound in context(tensorrt).executed:
        for layer in range(2):
            for part, buffers in (("key", cache.key_buffers), ("value", cache.value_buffers)):
                past, present = f"past_key_values.{layer}.{part}", f"present.{layer}.{part}"
                assert bound[past] == bound[present] == buffers[layer].address


def test_a_row_of_a_batch_is_prefilled_where_it_lies(batch_bundle: Path, tensorrt: FakeTensorRT) -> None:
    session = load(batch_bundle)
    cache = session.new_cache(3)
    row = cache.row(1)
    session.step([TOKENS], row)
    assert cache.lengths.tolist() == [0, len(TOKENS), 0]
    stride = 2 * 64 * 16 * 4  # K · S · h of fp32
    _, _, bound = context(tensorrt).executed[-1]
    assert bound["present.1.value"] == cache.value_buffers[1].address + stride
    written = [np.asarray(cache.key_buffers[0])[index].any() for index in range(3)]
    assert written == [False, True, False]


def test_a_cache_begins_cleared_and_is_one_allocation(
    engine_bundle: Path, tensorrt: FakeTensorRT, cudart: FakeCudart
) -> None:
    session = load(engine_bundle)
    before = cudart.calls["cudaMalloc"]
    cache = session.new_cache(3)
    assert cudart.calls["cudaMalloc"] == before + 1
    assert cache.length == 0
    for buffer in (*cache.key_buffers, *cache.value_buffers):
        assert buffer.shape == (3, 2, 64, 16)
        assert buffer.address % 256 == 0
        assert not np.asarray(buffer).any()


def test_memory_is_given_back(engine_bundle: Path, tensorrt: FakeTensorRT, cudart: FakeCudart) -> None:
    session = load(engine_bundle)
    session.step([[5]], session.new_cache())
    gc.collect()
    before, pinned = cudart.used, len(cudart.allocations)
    for _ in range(3):
        cache = session.new_cache(2)
        session.step([[5], [6]], cache)
        assert cudart.used == before + 2 * 4 * 2 * 64 * 16 * 4  # rows · buffers · K · S · h of fp32
        del cache
        gc.collect()
    assert (cudart.used, len(cudart.allocations)) == (before, pinned)


def test_a_row_keeps_its_cache_alive(batch_bundle: Path, tensorrt: FakeTensorRT) -> None:
    session = load(batch_bundle)
    row = session.new_cache(3).row(2)
    gc.collect()
    session.step([TOKENS], row)
    assert row.keys(0).any()


def test_caches_do_not_disturb_each_other(engine_bundle: Path, tensorrt: FakeTensorRT) -> None:
    session, reference = load(engine_bundle), on_cpu(engine_bundle)
    ours, theirs = ([each.new_cache(), each.new_cache()] for each in (session, reference))
    for tokens, index in ((TOKENS, 0), (TOKENS[:3], 1), ([5], 0), ([5], 1), ([9, 9], 0)):
        found, wanted = session.step([tokens], ours[index]), reference.step([tokens], theirs[index])
        np.testing.assert_allclose(found, wanted, atol=1e-4)


def test_logits_stay_until_the_next_run_over_the_same_cache(
    engine_bundle: Path, tensorrt: FakeTensorRT
) -> None:
    session = load(engine_bundle)
    backend = session._backend
    first, second = session.new_cache(), session.new_cache()
    logits = backend.run(np.array([[5]]), np.array([[0]]), first)
    kept = logits.copy()
    backend.run(np.array([[6]]), np.array([[0]]), second)
    np.testing.assert_array_equal(logits, kept)
    assert backend.run(np.array([[6]]), np.array([[1]]), first) is logits


def test_rows_that_are_not_aligned_run_alone(tmp_path: Path, tensorrt: FakeTensorRT) -> None:
    shape = Shape(kv_heads=1, slots=31, cache_dtype="float16", logits="last")  # 992 bytes a row
    bundle = write_engine_bundle(tmp_path / "bundle", shape)
    session = load(bundle)
    with pytest.raises(BundleError, match="992 bytes, which is no multiple of 256") as caught:
        session.new_cache(2)
    assert "--max-length" in caught.value.hint
    assert (
        session.generate("a", max_new_tokens=4).tokens
        == on_cpu(bundle).generate("a", max_new_tokens=4).tokens
    )


def test_the_runtime_cache_lies_beside_the_bundle(tmp_path: Path, tensorrt: FakeTensorRT) -> None:
    bundle = write_engine_bundle(tmp_path / "bundle")
    session = load(bundle)
    cache = tensorrt.engines[-1].config.cache
    assert cache.kernels == b""
    cache.kernels = b"compiled"
    del session
    gc.collect()
    assert (tmp_path / "bundle.runtime-cache" / "sm89").read_bytes() == b"kernels of SM 89:compiled"
    open_bundle(bundle, check="full")
    load(bundle)
    assert tensorrt.engines[-1].config.cache.kernels == b"compiled"
    assert [path.name for path in (tmp_path / "bundle.runtime-cache").iterdir()] == ["sm89"]


def test_a_runtime_cache_of_another_device_is_replaced(tmp_path: Path, tensorrt: FakeTensorRT) -> None:
    bundle = write_engine_bundle(tmp_path / "bundle")
    folder = tmp_path / "bundle.runtime-cache"
    folder.mkdir()
    (folder / "sm89").write_bytes(b"kernels of SM 86:other")
    load(bundle)
    gc.collect()
    assert (folder / "sm89").read_bytes() == b"kernels of SM 89:"


def test_a_runtime_cache_that_cannot_be_written(tmp_path: Path, tensorrt: FakeTensorRT) -> None:
    bundle = write_engine_bundle(tmp_path / "bundle")
    (tmp_path / "bundle.runtime-cache").write_text("a file where the folder would be")
    assert load(bundle).generate("a", max_new_tokens=2).tokens
    gc.collect()
    assert (tmp_path / "bundle.runtime-cache").read_text() == "a file where the folder would be"


def test_cuda_graphs_are_asked_for(engine_bundle: Path, tensorrt: FakeTensorRT) -> None:
    load(engine_bundle)
    assert tensorrt.engines[-1].config.cuda_graph_strategy == CudaGraphStrategy.WHOLE_GRAPH_CAPTURE


def test_tensorrt_itself_has_no_such_options(
    tmp_path: Path, cudart: FakeCudart, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = FakeTensorRT(cudart, "10.15.1.29", rtx=False)
    monkeypatch.setitem(sys.modules, "tensorrt", module)
    engine = FakeEngineFile((PREFILL, DECODE, decode_batch(1, 4)), (87,), "10.15.1.29", "tensorrt")
    cudart.sm = 87
    bundle = write_engine_bundle(tmp_path / "bundle", Shape(logits="last"), engine)
    found = load(bundle).generate_batch(PROMPTS, max_new_tokens=6)
    assert found == on_cpu(bundle).generate_batch(PROMPTS, max_new_tokens=6)
    gc.collect()
    assert not (tmp_path / "bundle.runtime-cache").exists()


def test_what_was_compiled_from_an_onnx_bundle_is_run(tmp_path: Path, tensorrt: FakeTensorRT) -> None:
    bundle = write_engine_bundle(tmp_path / "bundle")
    write_manifest(bundle, {**engine_manifest(Shape(logits="last")), "target": "onnx"})
    load(bundle).generate("a", max_new_tokens=2).close()
    assert len(tensorrt.engines) == 1


def test_the_fake_would_have_noticed(engine_bundle: Path, tensorrt: FakeTensorRT) -> None:
    """A position behind the last slot, which TensorRT would drop silently."""
    session = load(engine_bundle)
    with pytest.raises(RuleBrokenError, match="position 64 is written to 64 slots"):
        session._backend.run(np.array([[5]]), np.array([[64]]), session.new_cache())
