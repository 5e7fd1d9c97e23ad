"""What the TensorRT backend says where a bundle and a machine do not fit: every sentence has both sides."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
from support.engine_bundle import DECODE, LAST, PREFILL, FakeEngineFile, engine_manifest, write_engine_bundle
from support.fake_device import FakeCudart
from support.fake_tensorrt import FakeEngine, FakeTensorRT
from support.small_bundle import Shape, write_manifest

from gemma_export.errors import BundleError, DeviceError, MissingDependencyError
from gemma_export.runtime.session import load


def test_an_engine_of_another_version(tmp_path: Path, tensorrt: FakeTensorRT) -> None:
    bundle = write_engine_bundle(tmp_path / "bundle", LAST, FakeEngineFile(version="1.6.0.5"))
    with pytest.raises(
        BundleError, match=r"TensorRT for RTX 1\.6\.0\.5 .* 1\.7\.1\.116 is installed"
    ) as caught:
        load(bundle)
    assert "tensorrt-rtx==1.6.0.5" in caught.value.hint
    assert "gemma-export compile" in caught.value.hint
    assert tensorrt.engines == []  # Nothing was loaded.


def test_an_engine_of_another_device(tmp_path: Path, tensorrt: FakeTensorRT, cudart: FakeCudart) -> None:
    engines = FakeEngineFile(sms=(80, 86), name="a"), FakeEngineFile(sms=(120,), name="b")
    bundle = write_engine_bundle(tmp_path / "bundle", LAST, *engines)
    with pytest.raises(BundleError, match="engines run on SM 80, 86, 120; Fake GPU is SM 89") as caught:
        load(bundle)
    assert "gemma-export compile BUNDLE --target rtx --sm 89" in caught.value.hint


@pytest.mark.parametrize(("sm", "name"), [(75, "turing"), (89, "rest"), (120, "rest")])
def test_the_engine_of_this_device_is_taken(
    tmp_path: Path, tensorrt: FakeTensorRT, cudart: FakeCudart, sm: int, name: str
) -> None:
    cudart.sm = sm
    engines = (
        FakeEngineFile((DECODE, PREFILL), (75,), name="turing"),
        FakeEngineFile((PREFILL, DECODE), (89, 120), name="rest"),
    )
    session = load(write_engine_bundle(tmp_path / "bundle", LAST, *engines))
    assert session.generate("a", max_new_tokens=2).tokens
    first = tensorrt.engines[-1].profiles[0]["input_ids"][2]
    assert first == ([1, 1] if name == "turing" else [1, 8])


def test_the_engine_of_the_installed_version_is_taken(tmp_path: Path, tensorrt: FakeTensorRT) -> None:
    engines = FakeEngineFile(version="1.6.0.5", name="old"), FakeEngineFile(name="new")
    session = load(write_engine_bundle(tmp_path / "bundle", LAST, *engines))
    assert session.generate("a", max_new_tokens=2).tokens


def test_no_tensorrt(engine_bundle: Path, cudart: FakeCudart, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", None)
    with pytest.raises(MissingDependencyError, match=r"needs TensorRT for RTX 1\.7\.1\.116") as caught:
        load(engine_bundle)
    assert "pip install 'gemma-export[rtx]' tensorrt-rtx==1.7.1.116" in caught.value.hint


@pytest.mark.parametrize(("flavour", "extra"), [("rtx", "rtx"), ("tensorrt", "gpu")])
def test_no_cuda_bindings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flavour: str, extra: str) -> None:
    monkeypatch.setitem(sys.modules, "cuda.bindings.runtime", None)
    bundle = write_engine_bundle(tmp_path / "bundle", LAST, FakeEngineFile(flavour=flavour))
    with pytest.raises(MissingDependencyError, match="cuda-bindings, which is not installed") as caught:
        load(bundle)
    assert f"gemma-export[{extra}]" in caught.value.hint


@pytest.mark.parametrize(
    ("driver", "devices", "message"),
    [
        (0, 1, "no NVIDIA driver"),
        (12040, 1, r"CUDA 12\.4; the installed cuda-bindings need 13\.0"),
        (13000, 0, "finds no GPU"),
    ],
    ids=["no driver", "an old driver", "no device"],
)
def test_no_device(
    engine_bundle: Path,
    tensorrt: FakeTensorRT,
    cudart: FakeCudart,
    driver: int,
    devices: int,
    message: str,
) -> None:
    cudart.driver, cudart.devices = driver, devices
    with pytest.raises(DeviceError, match=message) as caught:
        load(engine_bundle)
    assert caught.value.hint


def test_the_command_line_ends_with_a_sentence(engine_bundle: Path) -> None:
    """With the real cuda-bindings, and no device that they could find."""
    done = subprocess.run(
        [sys.executable, "-m", "gemma_export", "generate", str(engine_bundle), "Hello"],
        capture_output=True,
        text=True,
        check=False,
        env={"CUDA_VISIBLE_DEVICES": "", "PATH": "", "COLUMNS": "200"},
    )
    assert done.returncode == 1
    assert done.stdout == ""
    assert "Traceback" not in done.stderr
    assert "NVIDIA driver" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 2


def test_a_bundle_for_rtx_without_an_engine(tmp_path: Path) -> None:
    bundle = write_engine_bundle(tmp_path / "bundle")
    write_manifest(bundle, {**engine_manifest(LAST), "engines": []})
    with pytest.raises(BundleError, match="is for rtx and has no engine") as caught:
        load(bundle)
    assert "--target rtx" in caught.value.hint


@pytest.mark.parametrize("content", [b"", b"no engine"], ids=["empty", "something else"])
def test_a_file_that_is_no_engine(tmp_path: Path, tensorrt: FakeTensorRT, content: bytes) -> None:
    bundle = write_engine_bundle(tmp_path / "bundle")
    (bundle / "engines" / "model.engine").write_bytes(content)
    write_manifest(bundle, engine_manifest(LAST))
    with pytest.raises(BundleError, match=r"model\.engine"):
        load(bundle)


def test_an_engine_that_is_not_in_the_bundle(tmp_path: Path, tensorrt: FakeTensorRT) -> None:
    bundle = write_engine_bundle(tmp_path / "bundle")
    (bundle / "engines" / "model.engine").unlink()
    write_manifest(bundle, engine_manifest(LAST))
    with pytest.raises(BundleError, match=r"no engines/model\.engine"):
        load(bundle)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_layers": 3}, r"past_key_values\.2\.key is no tensor, not FLOAT INPUT"),
        ({"num_layers": 1}, r"past_key_values\.1\.key is FLOAT INPUT, not no tensor"),
        ({"head_dim": 8}, r"its profile prefill has past_key_values\.0\.key as"),
    ],
    ids=["more layers", "fewer layers", "smaller heads"],
)
def test_an_engine_of_another_model(
    tmp_path: Path, tensorrt: FakeTensorRT, change: dict[str, int], message: str
) -> None:
    bundle = write_engine_bundle(tmp_path / "bundle")
    contents = engine_manifest(LAST)
    contents["model"].update(change)
    write_manifest(bundle, contents)
    with pytest.raises(BundleError, match=message):
        load(bundle)


def test_an_engine_with_another_cache(tmp_path: Path, tensorrt: FakeTensorRT) -> None:
    bundle = write_engine_bundle(tmp_path / "bundle")
    write_manifest(bundle, engine_manifest(Shape(logits="last", cache_dtype="float16")))
    with pytest.raises(BundleError, match="FLOAT INPUT, not HALF INPUT"):
        load(bundle)


def change_profiles(bundle: Path, change: Any) -> None:
    contents = engine_manifest(LAST)
    change(contents["engines"][0]["profiles"])
    write_manifest(bundle, contents)


def test_an_engine_with_other_profiles(tmp_path: Path, tensorrt: FakeTensorRT) -> None:
    bundle = write_engine_bundle(tmp_path / "bundle")
    change_profiles(bundle, lambda profiles: profiles.pop())
    with pytest.raises(BundleError, match="it has 2 profiles, not 1"):
        load(bundle)
    change_profiles(bundle, lambda profiles: profiles[0]["tokens"].update(max=16))
    with pytest.raises(BundleError, match="its profile prefill has input_ids as"):
        load(bundle)


def test_an_engine_that_updates_another_cache(
    engine_bundle: Path, tensorrt: FakeTensorRT, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(FakeEngine, "get_aliased_input_tensor", lambda self, name: "past_key_values.0.key")
    with pytest.raises(
        BundleError, match=r"present\.0\.value is written in place of past_key_values\.0\.key"
    ):
        load(engine_bundle)


def test_what_tensorrt_itself_says(tmp_path: Path, cudart: FakeCudart) -> None:
    """The real module, which takes nothing that it did not build."""
    real = pytest.importorskip("tensorrt_rtx")
    engine = FakeEngineFile(version=real.__version__)
    bundle = write_engine_bundle(tmp_path / "bundle", LAST, engine)
    with pytest.raises(BundleError, match=r"cannot load .*model\.engine: .*Serialization"):
        load(bundle)


def test_an_engine_that_runs_no_single_row(tmp_path: Path, tensorrt: FakeTensorRT) -> None:
    engine = FakeEngineFile((("decode-batch", (2, 2, 2), (1, 1, 1)),))
    bundle = write_engine_bundle(tmp_path / "bundle", LAST, engine)
    with pytest.raises(BundleError, match="no profile runs one row"):
        load(bundle)


def test_the_extras_bring_what_the_messages_name() -> None:
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    for extra, package in (("rtx", "tensorrt-rtx"), ("gpu", "tensorrt")):
        names = {re.split(r"[<>=~]", each)[0] for each in project["optional-dependencies"][extra]}
        assert {package, "cuda-bindings"} <= names
