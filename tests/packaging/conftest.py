"""The wheel, built from this tree as it is, and installed where only these tests look."""

import shutil
import tomllib
import zipfile
from pathlib import Path

import pytest
from support.wheels import build_wheel

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def project() -> dict[str, object]:
    """What pyproject.toml says."""
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


@pytest.fixture(scope="session")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the tree, so that nothing is left in it by a build and nothing old is picked up."""
    folder = tmp_path_factory.mktemp("source")
    made = shutil.ignore_patterns("__pycache__", "*.partial", "*.so")
    for path in ROOT.iterdir():
        if path.name.startswith(".") or path.name in ("build", "dist", "bundles", "tests"):
            continue
        if path.is_dir() and not path.name.endswith(".egg-info"):
            shutil.copytree(path, folder / path.name, ignore=made)
        elif path.is_file():
            shutil.copyfile(path, folder / path.name)
    # A test in the tree, to see that it stays out.
    (folder / "tests").mkdir()
    (folder / "tests" / "test_nothing.py").touch()
    return folder


@pytest.fixture(scope="session")
def wheel(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, as this machine builds it."""
    return build_wheel(source, tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="session")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that the wheel was unpacked to, as an installer does; put it on PYTHONPATH."""
    folder = tmp_path_factory.mktemp("installed")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    return folder
