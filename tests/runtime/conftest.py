from pathlib import Path

import pytest
from support.small_bundle import TOKENIZER, Shape, write_bundle

from gemma_export.runtime.session import Session, load
from gemma_export.runtime.tokenizer import Tokenizer


@pytest.fixture(scope="session")
def small_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle with the logits of all tokens and 64 slots. Read only: copy it to change it."""
    return write_bundle(tmp_path_factory.mktemp("runtime") / "small")


@pytest.fixture(scope="session")
def session(small_bundle: Path) -> Session:
    return load(small_bundle, threads=1)


@pytest.fixture(scope="session")
def last_session(tmp_path_factory: pytest.TempPathFactory) -> Session:
    """The same model with the logits of the last token only."""
    return load(write_bundle(tmp_path_factory.mktemp("runtime") / "last", Shape(logits="last")), threads=1)


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return Tokenizer(TOKENIZER, vocab_size=2048)
