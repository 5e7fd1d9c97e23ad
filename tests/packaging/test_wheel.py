"""What is installed: all of the package, and nothing else."""

import email
import email.message
import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open

from gemma_export.version import __version__

ROOT = Path(__file__).parents[2]
ROOMS = ("calibration", "exporter", "graphs", "runtime")
KERNELS = "gemma_export/runtime/native/_kernels.abi3.so"
"""Which is there where there is a C compiler (`test_native_kernels`)."""
SHIPPED = ("tiny", "tiny2")
SHIPPED_FILES = {
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.model",
    "training.json",
}
MOST_WEIGHT = 16_000_000


@pytest.fixture(scope="module")
def names(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


@pytest.fixture(scope="module")
def metadata(wheel: Path) -> email.message.Message:
    with zipfile.ZipFile(wheel) as archive:
        return email.message_from_bytes(archive.read(f"gemma_export-{__version__}.dist-info/METADATA"))


def run(installed: Path, *command: str) -> "subprocess.CompletedProcess[str]":
    """Runs Python with the installed wheel in front of the tree, from a folder that has neither."""
    environment = {**os.environ, "PYTHONPATH": str(installed)}
    return subprocess.run(
        [sys.executable, *command],
        capture_output=True,
        text=True,
        cwd=installed.parent,
        env=environment,
        check=False,
    )


def test_holds_every_module_and_the_tiny_models_and_nothing_else(names: set[str]) -> None:
    modules = {
        f"gemma_export/{path.relative_to(ROOT).as_posix()}"
        for room in ROOMS
        for path in (ROOT / room).rglob("*.py")
    }
    modules |= {path.relative_to(ROOT / "src").as_posix() for path in (ROOT / "src").rglob("*.py")}
    data = {f"gemma_export/exporter/{size}/{name}" for size in SHIPPED for name in SHIPPED_FILES}
    data |= {"gemma_export/py.typed"}
    packaged = {name for name in names if ".dist-info/" not in name}
    assert packaged - {KERNELS} == modules | data


def test_site_packages_gets_one_name(names: set[str]) -> None:
    assert {name.split("/")[0] for name in names} == {"gemma_export", f"gemma_export-{__version__}.dist-info"}


def test_the_installed_package_is_what_is_imported(installed: Path) -> None:
    code = (
        "import gemma_export.exporter.config as config, gemma_export.runtime.session as session\n"
        "print(config.__file__, session.__file__)"
    )
    done = run(installed, "-c", code)
    assert done.returncode == 0, done.stderr
    assert all(Path(file).is_relative_to(installed) for file in done.stdout.split())


@pytest.mark.parametrize(
    "code",
    [
        pytest.param("import gemma_export, gemma_export.runtime.session", id="runtime"),
        pytest.param("import gemma_export; gemma_export.load", id="load"),
        pytest.param(
            "from gemma_export.exporter.cli import app\nfrom typer.main import get_command\nget_command(app)",
            id="command line",
        ),
    ],
)
def test_running_needs_nothing_that_building_needs(installed: Path, code: str) -> None:
    heavy = "torch onnx onnx_ir onnxscript transformers safetensors tokenizers matplotlib"
    check = f"\nimport sys\nprint(*sorted(set({heavy!r}.split()) & set(sys.modules)))"
    done = run(installed, "-c", code + check)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == []


@pytest.mark.parametrize("model", SHIPPED)
def test_a_shipped_model_builds_from_where_it_is_installed(installed: Path, model: str) -> None:
    code = (
        "from gemma_export.exporter.source import open_source\n"
        f"source = open_source(size={model!r})\n"
        "print(source.checkpoint.folder, source.tokenizer, source.size)"
    )
    done = run(installed, "-c", code)
    assert done.returncode == 0, done.stderr
    folder, tokenizer, size = done.stdout.split()
    assert (Path(folder), Path(tokenizer).parent, size) == (
        installed / "gemma_export/exporter" / model,
        installed / "gemma_export/exporter" / model,
        model,
    )


def test_the_command_is_the_module(installed: Path) -> None:
    done = run(installed, "-m", "gemma_export", "--version")
    assert done.stdout == f"gemma-export {__version__}\n", done.stderr


def test_imports_between_rooms_keep_their_contracts(installed: Path) -> None:
    code = "import sys; from importlinter.cli import lint_imports_command as run; run(sys.argv[1:])"
    done = run(installed, "-c", code, "--no-cache", "--no-logo", "--config", str(ROOT / "pyproject.toml"))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "0 broken" in done.stdout


def test_version_is_one(metadata: email.message.Message) -> None:
    assert metadata["Version"] == __version__
    assert f"## [{__version__}]" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_metadata_says_what_it_is(metadata: email.message.Message) -> None:
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata.get_all("License-File") == ["LICENSE"]
    assert metadata["Requires-Python"] == ">=3.11"
    assert metadata["Description-Content-Type"] == "text/markdown"


def test_every_way_to_torch_keeps_its_bounds(metadata: email.message.Message) -> None:
    """The CPU wheel is chosen only where torch is bounded in the same resolution."""
    requirements = metadata.get_all("Requires-Dist") or []
    torch = [line for line in requirements if line.split(";")[0].strip().startswith("torch")]
    assert torch == ['torch~=2.13.0; extra == "export"']
    assert not any(
        ";" not in line and line.startswith(("torch", "onnx", "transformers")) for line in requirements
    )


def test_every_dependency_has_a_lower_bound(project: dict[str, Any]) -> None:
    extras = project["project"]["optional-dependencies"]
    declared = [*project["project"]["dependencies"], *(line for lines in extras.values() for line in lines)]
    assert [line for line in declared if not any(bound in line for bound in (">=", "~="))] == []


@pytest.mark.parametrize("model", SHIPPED)
def test_the_shipped_weights_are_small_and_in_bfloat16(model: str) -> None:
    path = ROOT / "exporter" / model / "model.safetensors"
    assert path.stat().st_size <= MOST_WEIGHT
    with safe_open(path, framework="numpy") as tensors:
        shapes = {name: tensors.get_slice(name) for name in tensors.keys()}  # noqa: SIM118  # Not a mapping.
        parameters = 0
        for part in shapes.values():
            assert part.get_dtype() == "BF16"
            size = 1
            for extent in part.get_shape():
                size *= extent
            parameters += size
    assert parameters == json.loads((path.parent / "training.json").read_text())["parameters"]
