"""Checkpoints, oracles and bundles of the families, each made once, when a test first asks for it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.oracle import FAMILIES, SLOTS, load_oracle, random_gemma, save_checkpoint

from gemma_export.exporter.pipeline import BuildResult, build
from gemma_export.exporter.request import BuildRequest
from gemma_export.runtime.session import Session, load

BuildOnce = Callable[..., BuildResult]
Open = Callable[..., Session]


@pytest.fixture(scope="session")
def checkpoint_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The checkpoint of a family, as Hugging Face saves it."""
    made: dict[str, Path] = {}

    def checkpoint(family: str) -> Path:
        if family not in made:
            folder, shape = tmp_path_factory.mktemp("checkpoints") / family, FAMILIES[family]
            made[family] = save_checkpoint(random_gemma(shape), folder, shape.dtype)
        return made[family]

    return checkpoint


@pytest.fixture(scope="session")
def oracle_of(checkpoint_of: Callable[[str], Path]) -> Callable[[str], Any]:
    """A family's checkpoint, run by `transformers`."""
    made: dict[str, Any] = {}

    def oracle(family: str) -> Any:
        if family not in made:
            made[family] = load_oracle(checkpoint_of(family))
        return made[family]

    return oracle


@pytest.fixture(scope="session")
def _built() -> dict[Any, BuildResult]:
    return {}


@pytest.fixture
def build_once(
    traced_once: None, _built: dict[Any, BuildResult], tmp_path_factory: pytest.TempPathFactory
) -> BuildOnce:
    """Builds what is asked for, or gives what an earlier test built. Read only: copy it to change it."""

    def make(**options: Any) -> BuildResult:
        options = {"parity": "none", **options}
        key = tuple(sorted((name, str(value)) for name, value in options.items()))
        if key not in _built:
            output = tmp_path_factory.mktemp("oracle") / "bundle"
            _built[key] = build(BuildRequest(output=output, **options))
        return _built[key]

    return make


@pytest.fixture
def open_family(build_once: BuildOnce, checkpoint_of: Callable[[str], Path]) -> Open:
    """A session over the fp32 bundle of a family, built by the real pipeline from the files on the disk."""

    def opened(family: str, logits: str = "all") -> Session:
        result = build_once(checkpoint=checkpoint_of(family), logits=logits, max_length=SLOTS)
        return load(result.path, threads=1)

    return opened
