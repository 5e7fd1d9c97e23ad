"""The CUDA backend as far as it goes without a GPU: what it says where it cannot run; its memory."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest

from gemma_export.errors import BundleError, DeviceError, GemmaExportError, MissingDependencyError
from gemma_export.runtime.bundle import open_bundle
from gemma_export.runtime.cuda_libraries import load_cuda_provider, missing_library, package_of
from gemma_export.runtime.onnxruntime import OnnxRuntimeBackend
from gemma_export.runtime.onnxruntime_cuda import CudaBackend, DeviceBuffer, refusal
from gemma_export.runtime.onnxruntime_graph import LoadedGraph
from gemma_export.runtime.session import load

without_cuda = pytest.mark.skipif(
    "CUDAExecutionProvider" in ort.get_available_providers(), reason="this onnxruntime has CUDA"
)


@without_cuda
def test_an_onnxruntime_without_cuda_is_not_used_in_its_place(small_bundle: Path, tmp_path: Path) -> None:
    bundle = tmp_path / "bundle"
    shutil.copytree(small_bundle, bundle)
    manifest = json.loads((bundle / "manifest.json").read_text())
    (bundle / "manifest.json").write_text(json.dumps(manifest | {"target": "cuda"}))
    with pytest.raises(MissingDependencyError, match="has no CUDA provider") as refused:
        load(bundle)
    assert "pip uninstall onnxruntime" in refused.value.hint
    assert "gemma-export[cuda]" in refused.value.hint


@without_cuda
def test_it_is_refused_before_anything_is_loaded() -> None:
    with pytest.raises(MissingDependencyError, match=re.escape(ort.__version__)):
        load_cuda_provider(ort)


# As the loader of a machine without them says it.
NOT_FOUND = "cannot open shared object file: No such file or directory"


@pytest.mark.parametrize(
    ("library", "cuda", "package"),
    [
        ("libcublasLt.so.13", "13.0", "nvidia-cublas"),
        ("libcublas.so.12", "12.8", "nvidia-cublas-cu12"),
        ("libcudart.so.13", "13.0", "nvidia-cuda-runtime"),
        ("libcurand.so.10", "13.0", "nvidia-curand"),
        ("libcufft.so.12", "13.0", "nvidia-cufft"),
        ("libcudnn.so.9", "13.0", "nvidia-cudnn-cu13"),
        ("libcudnn.so.9", "12.8", "nvidia-cudnn-cu12"),
    ],
)
def test_a_missing_library_is_named_with_its_package(library: str, cuda: str, package: str) -> None:
    error = missing_library(f"{library}: {NOT_FOUND}", "1.31.1", cuda)
    assert isinstance(error, MissingDependencyError)
    assert f"needs {library}, which is not installed" in error.message
    assert f"`pip install {package}`" in error.hint


def test_the_drivers_library_is_no_package() -> None:
    error = missing_library(f"libcuda.so.1: {NOT_FOUND}", "1.31.1", "13.0")
    assert isinstance(error, DeviceError)
    assert "libcuda.so.1" in error.message
    assert "driver" in error.hint
    assert "pip install" not in error.hint


def test_a_library_that_nobody_knows_is_named_all_the_same() -> None:
    error = missing_library(f"libfuture.so.3: {NOT_FOUND}", "1.31.1", "13.0")
    assert isinstance(error, MissingDependencyError)
    assert "libfuture.so.3" in error.message
    assert "pip install" not in error.hint
    assert package_of("libfuture", "13.0") is None


def test_another_reason_is_passed_on() -> None:
    reason = "/lib/libc.so.6: version `GLIBC_2.99' not found (required by libonnxruntime_providers_cuda.so)"
    error = missing_library(reason, "1.31.1", "13.0")
    assert isinstance(error, DeviceError)
    assert reason in error.message


# What onnxruntime-gpu 1.31.1 raised, shortened in the middle.
@pytest.mark.parametrize(
    ("reason", "kind", "says", "hint"),
    [
        (
            "/onnxruntime_src/cuda_call.cc:154 […] CUDA failure 36: API call is not supported in the "
            "installed CUDA driver ; GPU=-1 ; hostname=vm ; file=cuda.cc ; line=355",
            DeviceError,
            "cannot use a GPU: API call is not supported in the installed CUDA driver (CUDA error 36)",
            "nvidia-smi",
        ),
        (
            "CUDA failure 100: no CUDA-capable device is detected ; GPU=-1 ; hostname=vm ; file=x ; line=1",
            DeviceError,
            "no CUDA-capable device is detected",
            "driver",
        ),
        (
            "[ONNXRuntimeError] : 1 : FAIL : This session contains graph nodes that are assigned to the "
            "default CPU EP, but fallback to CPU EP has been explicitly disabled by the user.",
            BundleError,
            "has no kernel for a part of bundle/model.onnx",
            "build the bundle again",
        ),
        (
            "[ONNXRuntimeError] : 6 : RUNTIME_EXCEPTION : BFCArena::AllocateRawInternal Failed to allocate "
            "memory for requested buffer of size 1048576000",
            DeviceError,
            "memory is too small for the weights of bundle/model.onnx",
            "--precision",
        ),
        (
            "[ONNXRuntimeError] : 7 : INVALID_PROTOBUF : Load model failed:Protobuf parsing failed.\nmore",
            BundleError,
            "Protobuf parsing failed.",
            "build the bundle again",
        ),
    ],
    ids=["driver", "no device", "kernel", "memory", "graph"],
)
def test_what_onnxruntime_raises_becomes_a_sentence(
    reason: str, kind: type[GemmaExportError], says: str, hint: str
) -> None:
    error = refusal("bundle/model.onnx", RuntimeError(reason), "1.31.1", "13.0")
    assert type(error) is kind
    assert says in error.message
    assert hint in error.hint
    assert "\n" not in error.message


def test_rows_of_a_buffer_are_its_memory() -> None:
    """onnxruntime's own value, in the host's memory."""
    values = np.arange(4 * 2 * 3 * 2, dtype=np.float16).reshape(4, 2, 3, 2)
    owner = ort.OrtValue.ortvalue_from_numpy(values)
    buffer = DeviceBuffer(owner, owner.data_ptr(), range(4))
    assert buffer.shape == (4, 2, 3, 2)
    row = buffer[1:3][1:2]
    assert row.shape == (1, 2, 3, 2)
    assert row.address - buffer.address == 2 * values[0].nbytes
    np.testing.assert_array_equal(np.asarray(row), values[2:3])
    np.testing.assert_array_equal(np.asarray(row, np.float32), values[2:3].astype(np.float32))
    with pytest.raises(ValueError, match="consecutive"):
        _ = buffer[::2]


def test_several_tokens_of_several_rows_are_run_row_by_row(small_bundle: Path) -> None:
    """The same as all at once, of a graph that takes both: on a CPU."""
    bundle = open_bundle(small_bundle, check="sizes")
    host = OnnxRuntimeBackend(bundle, 1)
    backend = CudaBackend.__new__(CudaBackend)
    LoadedGraph.__init__(backend, host.session, bundle.manifest, "cpu")
    ids = np.array([[2, 5, 7], [2, 11, 3]])
    positions = np.tile(np.arange(3), (2, 1))
    ours, theirs = host.new_cache(2), host.new_cache(2)
    by_rows = backend.run(ids, positions, ours)
    together = host.run(ids, positions, theirs)
    # Sums of another order: a few roundings of 2^-24.
    np.testing.assert_allclose(by_rows, together, rtol=0, atol=1e-5 * float(np.abs(together).max()))
    for mine, other in zip(ours.key_buffers, theirs.key_buffers, strict=True):
        np.testing.assert_allclose(mine[:, :, :3], other[:, :, :3], rtol=0, atol=1e-5)
    # And then one token of each at once, over what the rows wrote.
    one, next_positions = np.array([[4], [9]]), np.full((2, 1), 3)
    np.testing.assert_allclose(
        backend.run(one, next_positions, ours),
        host.run(one, next_positions, theirs),
        rtol=0,
        atol=1e-5 * float(np.abs(together).max()),
    )
