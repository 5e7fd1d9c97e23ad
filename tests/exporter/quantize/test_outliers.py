"""Planting outlier channels changes the activations and nothing that is said.

The checkpoint of `benchmarks/outliers.py` is what the tests of smoothing are run on; were it another model,
they would prove nothing.
"""

import numpy as np
import numpy.typing as npt
import pytest

from benchmarks.outliers import outlier_channels, plant_outliers, readers
from gemma_export.exporter.config import SHIPPED, tiny_folder
from gemma_export.exporter.parity.reference import Reference
from gemma_export.exporter.source import Source, open_source

TOKENS = (2, 700, 31, 1500, 1500, 9, 2047, 412, 88, 1033, 265, 640)


@pytest.fixture(scope="module", params=SHIPPED)
def shipped(request: pytest.FixtureRequest) -> Source:
    return open_source(size=request.param)


@pytest.fixture(scope="module")
def planted(shipped: Source, tmp_path_factory: pytest.TempPathFactory) -> Source:
    assert shipped.size is not None
    folder = tmp_path_factory.mktemp("outliers") / "checkpoint"
    return open_source(plant_outliers(tiny_folder(shipped.size), folder))


def _logits(source: Source) -> npt.NDArray[np.float32]:
    return Reference(source.config, source.weights).run([TOKENS], keep_cache=False).logits(0)


def _norms(source: Source) -> dict[str, npt.NDArray[np.float32]]:
    """Largest value of each channel of every layer norm, [d]."""
    peaks: dict[str, npt.NDArray[np.float32]] = {}
    norms = readers(source.config)

    def observe(name: str, values: npt.NDArray[np.float32]) -> None:
        if name.rpartition(".")[2] in norms:
            peaks[name] = np.abs(values).reshape(-1, values.shape[-1]).max(axis=0)

    Reference(source.config, source.weights).run([TOKENS], observe=observe, keep_cache=False)
    return peaks


def test_the_logits_stay(shipped: Source, planted: Source) -> None:
    expected, found = _logits(shipped), _logits(planted)
    # Everything is scaled by a power of two and back, so sums round alike but for the gain: 2^-24 each.
    assert np.abs(found - expected).max() <= 1e-5 * np.abs(expected).max()


def test_the_chosen_channels_become_64_times_as_large(shipped: Source, planted: Source) -> None:
    before, after = _norms(shipped), _norms(planted)
    channels = outlier_channels(shipped.config)
    others = np.setdiff1d(np.arange(shipped.config.hidden_size), channels)
    assert len(channels) == 3
    assert len(before) == 2 * shipped.config.num_layers
    for name, peaks in before.items():
        # The same rounding as of the logits, but of a single channel, which may be small: 1e-4 of itself.
        np.testing.assert_allclose(after[name][channels], 64 * peaks[channels], rtol=1e-4)
        np.testing.assert_allclose(after[name][others], peaks[others], rtol=1e-4)


def test_they_stand_out(planted: Source) -> None:
    channels = outlier_channels(planted.config)
    for peaks in _norms(planted).values():
        # Ten times the median channel is where large models' outlier channels begin.
        assert peaks[channels].min() > 10 * np.median(peaks)


def test_the_tokenizer_and_the_shape_come_along(shipped: Source, planted: Source) -> None:
    assert shipped.tokenizer is not None
    assert planted.tokenizer is not None
    assert planted.tokenizer.read_bytes() == shipped.tokenizer.read_bytes()
    assert planted.config == shipped.config
