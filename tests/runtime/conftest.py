import sys
from pathlib import Path
from types import ModuleType
from typing import cast

import pytest
from support.engine_bundle import DECODE, LAST, PREFILL, FakeEngineFile, decode_batch, write_engine_bundle
from support.fake_device import FakeCudart
from support.fake_tensorrt import FakeTensorRT
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


@pytest.fixture
def cudart(monkeypatch: pytest.MonkeyPatch) -> FakeCudart:
    """A fake device in place of the one that is not here."""
    fake = FakeCudart()
    monkeypatch.setitem(sys.modules, "cuda.bindings.runtime", cast("ModuleType", fake))
    return fake


@pytest.fixture
def tensorrt(cudart: FakeCudart, monkeypatch: pytest.MonkeyPatch) -> FakeTensorRT:
    """TensorRT for RTX on it."""
    fake = FakeTensorRT(cudart)
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", cast("ModuleType", fake))
    return fake


@pytest.fixture(scope="session")
def engine_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With an engine for SM 89: prefill of 8 tokens at once, decode of one row. Read only."""
    return write_engine_bundle(tmp_path_factory.mktemp("runtime") / "engine")


@pytest.fixture(scope="session")
def batch_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with a profile that decodes 4 rows, no more and no fewer."""
    engine = FakeEngineFile((PREFILL, DECODE, decode_batch(4, 4)))
    return write_engine_bundle(tmp_path_factory.mktemp("runtime") / "batch", LAST, engine)
