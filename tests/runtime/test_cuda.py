import gc

import numpy as np
import pytest
from support.fake_device import FakeCudart

from gemma_export.errors import DeviceError
from gemma_export.runtime.cuda import CudaDevice, DeviceArray

pytestmark = pytest.mark.filterwarnings("error")


@pytest.fixture
def device(cudart: FakeCudart) -> CudaDevice:
    return CudaDevice(cudart)


def array(device: CudaDevice, values: np.ndarray) -> DeviceArray:
    """The values on the device; the copy is begun."""
    memory = device.allocate(values.nbytes, "a test")
    staged = device.pinned(values.shape, values.dtype)
    staged[...] = values
    device.upload(staged, memory.address)
    device.synchronize()
    return DeviceArray(memory, memory.address, values.shape, values.dtype)


def test_it_says_what_it_is(cudart: FakeCudart) -> None:
    cudart.sm, cudart.driver = 121, 13020
    device = CudaDevice(cudart)
    assert (device.sm, device.driver, device.name) == (121, "13.2", "Fake GPU")
    assert str(device) == "Fake GPU (SM 121, CUDA 13.2)"


def test_what_goes_up_comes_down(device: CudaDevice) -> None:
    values = np.arange(24, dtype=np.float16).reshape(4, 3, 2)
    there = array(device, values)
    np.testing.assert_array_equal(np.asarray(there), values)
    np.testing.assert_array_equal(np.asarray(there[1:3]), values[1:3])
    np.testing.assert_array_equal(np.asarray(there[1:3][1:]), values[2:3])
    np.testing.assert_array_equal(np.asarray(there[-1:], np.float32), values[-1:].astype(np.float32))
    assert there[4:].shape == (0, 3, 2)
    assert there.row_bytes == 12


def test_reading_waits_for_what_is_under_way(device: CudaDevice) -> None:
    there = array(device, np.zeros(4, np.int64))
    staged = device.pinned((4,), np.int64)
    staged[:] = 7
    device.upload(staged, there.address)
    np.testing.assert_array_equal(np.asarray(there), [7, 7, 7, 7])


def test_what_an_array_on_a_device_cannot_do(device: CudaDevice) -> None:
    there = array(device, np.zeros((4, 2), np.float32))
    with pytest.raises(ValueError, match="the step is 2"):
        _ = there[::2]
    with pytest.raises(ValueError, match="only be copied"):
        np.asarray(there, copy=False)


def test_a_slice_keeps_the_memory(device: CudaDevice, cudart: FakeCudart) -> None:
    row = array(device, np.ones((4, 2), np.float32))[3:]
    gc.collect()
    np.testing.assert_array_equal(np.asarray(row), [[1, 1]])
    del row
    gc.collect()
    assert cudart.used == 0


def test_a_view_of_pinned_memory_keeps_it(device: CudaDevice, cudart: FakeCudart) -> None:
    part = device.pinned((4, 2), np.float32)[2:]
    part[:] = 5
    gc.collect()
    assert len(cudart.allocations) == 1
    assert (part == 5).all()
    del part
    gc.collect()
    assert not cudart.allocations


def test_an_error_has_its_name(device: CudaDevice, cudart: FakeCudart) -> None:
    cudart.fail("cudaMalloc", cudart.cudaError_t.cudaErrorIllegalAddress)
    with pytest.raises(DeviceError, match=r"allocate a test: cudaErrorIllegalAddress \(700\)") as caught:
        device.allocate(16, "a test")
    assert "nvidia-smi" in caught.value.hint
    cudart.fail("cudaMallocHost", cudart.cudaError_t.cudaErrorMemoryAllocation)
    with pytest.raises(DeviceError, match="lock 1 MiB of the host's memory: cudaErrorMemoryAllocation"):
        device.pinned((1 << 18,), np.float32)


def test_too_little_memory_is_told_in_numbers(device: CudaDevice, cudart: FakeCudart) -> None:
    cudart.total = 1 << 30
    with pytest.raises(DeviceError) as caught:
        device.allocate(2 << 30, "a cache")
    assert "no room for a cache: 2,048 MiB are needed, 1,024 MiB of 1,024 MiB are free" in str(caught.value)
