"""Wheels of this project."""

import os
import subprocess
import sys
from pathlib import Path


def build_wheel(source: Path, output: Path, **environment: str) -> Path:
    """Builds a tree's wheel into a folder.

    Args:
        source: The tree; the build leaves its traces there.
        output: An empty folder.
        environment: Variables beside those there are.
    """
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(output)]
    done = subprocess.run(
        [*command, str(source)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, **environment},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = output.glob("*.whl")
    return wheel
