"""What the machine can do: that it is asked in the right way, not how fast it is."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest

from gemma_export.exporter.bench import machine
from gemma_export.exporter.bench.machine import (
    Memory,
    last_cache_bytes,
    matrix_rate,
    measure_machine,
    reading_rates,
)

SECONDS = 0.0  # Three passes.


class Clock:
    """Seconds that pass only when something is read."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_the_fastest_way_to_read_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    rates = iter([3.0, 7.0, 5.0])
    monkeypatch.setattr(machine, "reading_rates", lambda threads, seconds: zip("abc", rates, strict=True))
    monkeypatch.setattr(machine, "matrix_rate", lambda left, right, size, threads, seconds: float(size))
    measured = measure_machine(2)
    assert (measured.read, measured.read_by) == (7.0, "b")
    assert (measured.floats, measured.integers) == (2048.0, 2048.0)


class InTurn:
    """Threads of which each waits for those before it."""

    def __init__(self, threads: int) -> None:
        self.threads = threads

    def map(self, function: Callable[[np.ndarray], float], parts: Sequence[np.ndarray]) -> list[float]:
        assert len(parts) == self.threads
        return [function(part) for part in parts]

    def shutdown(self) -> None:
        """Nothing runs any more."""


@pytest.mark.parametrize(("seconds", "passes"), [(0.0, 1), (0.9, 1), (6.5, 3), (7.5, 4)])
def test_a_usual_rate_is_that_of_whole_passes(
    monkeypatch: pytest.MonkeyPatch, seconds: float, passes: int
) -> None:
    clock, read = Clock(), []

    def a_second(part: np.ndarray) -> None:
        # But for the second pass, in which the machine does something else.
        clock.now += 5 if len(read) == 1 else 1
        read.append(part.nbytes)

    monkeypatch.setattr(machine, "_LEAST_BYTES", 1 << 20)
    monkeypatch.setattr(machine, "last_cache_bytes", lambda: 0)
    monkeypatch.setattr(machine, "perf_counter", clock)
    monkeypatch.setattr(machine, "WAYS", {"slowly": a_second})
    with Memory(1) as memory:
        assert memory.usual_rate("slowly", seconds) == 1 << 20
    assert read == [1 << 20] * passes


@pytest.mark.parametrize("threads", [1, 3])
def test_threads_add_up(threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    parts: list[int] = []
    monkeypatch.setattr(machine, "_LEAST_BYTES", 3 << 20)
    monkeypatch.setattr(machine, "last_cache_bytes", lambda: 0)
    monkeypatch.setattr(machine, "perf_counter", iter([0.0, *[0.0, 2.0] * threads]).__next__)
    monkeypatch.setattr(machine, "ThreadPoolExecutor", InTurn)
    monkeypatch.setattr(machine, "WAYS", {"once": lambda part: parts.append(part.nbytes)})
    with Memory(threads) as memory:
        assert memory.usual_rate("once", 0.0) == pytest.approx((3 << 20) / 2)
    assert parts == [(3 << 20) // threads] * threads


@pytest.mark.parametrize("threads", [1, 3])
def test_every_byte_is_read_by_every_way(threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    read: dict[str, int] = {}

    def counted(how: str, way: object) -> object:
        def run(part: np.ndarray) -> object:
            read[how] = read.get(how, 0) + part.nbytes
            return way(part)  # type: ignore[operator]

        return run

    monkeypatch.setattr(machine, "_LEAST_BYTES", 3 << 20)
    monkeypatch.setattr(machine, "last_cache_bytes", lambda: 0)
    monkeypatch.setattr(machine, "WAYS", {how: counted(how, way) for how, way in machine.WAYS.items()})
    rates = dict(reading_rates(threads, SECONDS))
    assert set(rates) == set(read) == {"dot product", "maximum", "bitwise or"}
    assert all(rate > 0 for rate in rates.values())
    passes = 4  # One that does not count.
    assert set(read.values()) == {passes * ((3 << 20) // (64 * threads) * 64 * threads)}


def test_what_is_read_is_larger_than_the_caches(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    monkeypatch.setattr(machine, "_LEAST_BYTES", 1 << 20)
    monkeypatch.setattr(machine, "last_cache_bytes", lambda: 1 << 20)
    monkeypatch.setattr(machine, "WAYS", {"size": lambda part: sizes.append(part.nbytes)})
    list(reading_rates(1, SECONDS))
    assert set(sizes) == {8 << 20}


def test_caches_of_a_core(tmp_path: Path) -> None:
    assert last_cache_bytes(tmp_path) == 0
    for index, text in enumerate(["48K", "2M", "32768K"]):
        folder = tmp_path / f"index{index}"
        folder.mkdir()
        (folder / "size").write_text(f"{text}\n")
    assert last_cache_bytes(tmp_path) == 32 << 20


@pytest.mark.parametrize(("left", "right"), [(np.float32, np.float32), (np.uint8, np.int8)])
def test_a_product_has_two_operations_for_each_multiplication(
    left: type[np.generic], right: type[np.generic], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "_fastest", _half_a_second)
    assert matrix_rate(left, right, 64, 1, SECONDS) == 2 * 64**3 / 0.5


def _half_a_second(run: object, seconds: float) -> float:
    assert callable(run)
    (product,) = run()
    assert product.shape == (64, 64)
    assert np.abs(product).max() > 0
    return 0.5


def test_without_onnx_there_are_no_rates_of_matrices(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*arguments: object) -> float:
        raise ModuleNotFoundError("No module named 'onnx'", name="onnx")

    monkeypatch.setattr(machine, "reading_rates", lambda threads, seconds: [("a", 1.0)])
    monkeypatch.setattr(machine, "matrix_rate", missing)
    measured = measure_machine(1)
    assert (measured.read, measured.floats, measured.integers) == (1.0, None, None)
