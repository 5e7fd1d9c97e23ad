"""The wheel, built from this tree as it is, and installed where only these tests look."""

import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def project() -> dict[str, object]:
    """What pyproject.toml says."""
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from a copy, so that nothing is left in the tree and nothing old is picked up."""
    source, output = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for path in ROOT.iterdir():
        if path.name.startswith(".") or path.name in ("build", "dist", "bundles", "tests"):
            continue
        if path.is_dir() and not path.name.endswith(".egg-info"):
            shutil.copytree(
                path, source / path.name, ignore=shutil.ignore_patterns("__pycache__", "*.partial")
            )
        elif path.is_file():
            shutil.copyfile(path, source / path.name)
    # A test in the tree, to see that it stays out.
    (source / "tests").mkdir()
    (source / "tests" / "test_nothing.py").touch()
    command = [
        sys.executable,
        "-m",
        "build",
        "--wheel",
        "--no-isolation",
        "--outdir",
        str(output),
        str(source),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (built,) = output.glob("*.whl")
    return built


@pytest.fixture(scope="session")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that the wheel was unpacked to, as an installer does; put it on PYTHONPATH."""
    folder = tmp_path_factory.mktemp("installed")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    return folder
