"""What the machine can do: that it is asked in the right way, not how fast it is."""

from pathlib import Path

import numpy as np
import pytest

from gemma_export.exporter.bench import machine
from gemma_export.exporter.bench.machine import last_cache_bytes, matrix_rate, measure_machine, reading_rates

SECONDS = 0.0  # Three passes.


def test_the_fastest_way_to_read_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    rates = iter([3.0, 7.0, 5.0])
    monkeypatch.setattr(machine, "reading_rates", lambda threads, seconds: zip("abc", rates, strict=True))
    monkeypatch.setattr(machine, "matrix_rate", lambda left, right, size, threads, seconds: float(size))
    measured = measure_machine(2)
    assert (measured.read, measured.read_by) == (7.0, "b")
    assert (measured.floats, measured.integers) == (2048.0, 2048.0)


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
