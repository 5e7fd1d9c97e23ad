"""Compiled kernels are in the wheel where there is a compiler, and it is built where there is none."""

import shutil
import zipfile
from pathlib import Path

import pytest
from support.wheels import build_wheel

KERNELS = "gemma_export/runtime/native/_kernels.abi3.so"


def names(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


@pytest.mark.skipif(shutil.which("cc") is None, reason="there is no C compiler")
def test_one_file_serves_every_python(wheel: Path) -> None:
    assert KERNELS in names(wheel)
    assert "-cp311-abi3-linux_" in wheel.name


def test_a_wheel_is_built_without_a_compiler(source: Path, tmp_path: Path) -> None:
    # Elsewhere than the other wheel is built, since what that compiled lies there.
    tree = tmp_path / "source"
    shutil.copytree(source, tree, ignore=shutil.ignore_patterns("build", "*.egg-info", "*.so"))
    found = names(build_wheel(tree, tmp_path / "wheel", CC="no-such-compiler"))
    assert "gemma_export/runtime/native/__init__.py" in found
    assert [name for name in found if name.endswith((".so", ".c", ".h"))] == []
