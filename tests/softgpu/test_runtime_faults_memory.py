# SPDX-License-Identifier: Apache-2.0
"""Faults of the host in memory."""

import ctypes
from collections.abc import Iterator

import planted
import pytest
import torch
from runtime_handles import OK, Handle, memory

pytestmark = planted.needs_softgpu


@pytest.fixture
def uncached() -> Iterator[None]:
    """torch asks the runtime for every tensor, and gives it back at once."""
    torch.cuda.caching_allocator_enable(False)
    yield
    torch.cuda.caching_allocator_enable(True)


@pytest.mark.parametrize("words", [1, 100, 5000])
def test_a_read_past_an_allocation(kernels, says, uncached, words):
    """By a whole page it faults wherever the allocation lies."""
    source, to = memory(words), memory(20000)
    n = words + 1024
    assert (
        kernels.launch("copy", source, to, n, grid=(-(-n // 32), 1, 1)) == "cudaErrorLaunchFailure"
    )
    says(
        "copy(int const*, int*, int)",
        "invalid address 0x",
        f"past an allocation of {4 * words} bytes",
    )


def test_a_write_past_an_allocation_by_one_element(kernels, says, uncached):
    to = memory(100)
    assert kernels.launch("fill", to, 101, 7, grid=(4, 1, 1)) == "cudaErrorLaunchFailure"
    says("fill(int*, int, int)", "something was written", "0 bytes past an allocation of 400 bytes")


def test_a_write_before_an_allocation_by_one_element(kernels, says, uncached):
    to = memory(100)
    before = ctypes.c_void_p(to.data_ptr() - 4)
    assert kernels.launch("fill", before, 1, 7) == OK, "no argument points into an allocation"
    to = None
    says("cudaFree", "something was written", "4 bytes before an allocation of 400 bytes")


def test_a_read_after_the_free(kernels, says, uncached):
    source, to = memory(100), memory(100)
    address = ctypes.c_void_p(source.data_ptr())
    del source
    assert kernels.launch("copy", address, to, 100, grid=(4, 1, 1)) == "cudaErrorLaunchFailure"
    says("copy(int const*, int*, int)", "in an allocation of 400 bytes that was freed")


def test_a_null_pointer(kernels, says):
    assert kernels.launch("fill", ctypes.c_void_p(0), 1, 7) == "cudaErrorLaunchFailure"
    says("fill(int*, int, int)", "invalid address 0")


def test_fresh_memory_shows(kernels, uncached):
    fresh = torch.empty(1000, device="cuda")
    kernels.launch("copy", torch.empty(1000, device="cuda"), fresh, 1000, grid=(32, 1, 1))
    assert fresh.isnan().all()


def test_memory_is_freed_once(kernels, says):
    allocated = Handle(kernels, "cudaMalloc", 100).value
    assert kernels.call("cudaFree", allocated) == OK
    says()
    assert kernels.call("cudaFree", allocated) == "cudaErrorInvalidValue"
    says("cudaFree of 0x", "which was freed before (100 bytes)")
    assert kernels.call("cudaFree", allocated + 16) == "cudaErrorInvalidValue"
    says("cudaFree of 0x", "which is no allocation")
    assert kernels.call("cudaFree", 0) == OK


def test_a_copy_past_an_allocation(kernels, says, uncached):
    to, host = memory(100), torch.zeros(101, dtype=torch.int32)
    size = ctypes.c_size_t(404)
    error = kernels.call("cudaMemcpy", to.data_ptr(), host.data_ptr(), size, 1)
    assert error == "cudaErrorInvalidValue"
    says("cudaMemcpy of 404 bytes", "past the end of its allocation")
    error = kernels.call("cudaMemsetAsync", to.data_ptr(), ctypes.c_int(0), size, 0)
    assert error == "cudaErrorInvalidValue"
    says("cudaMemsetAsync of 404 bytes")
    address = to.data_ptr()
    del to
    error = kernels.call("cudaMemset", address, ctypes.c_int(0), ctypes.c_size_t(4))
    assert error == "cudaErrorInvalidValue"
    says("cudaMemset of 4 bytes", "that was freed")


def test_memory_runs_out(kernels):
    out = ctypes.c_void_p()
    size = torch.cuda.get_device_properties(0).total_memory + 1
    assert kernels.call("cudaMalloc", ctypes.byref(out), size) == "cudaErrorMemoryAllocation"
    with pytest.raises(torch.OutOfMemoryError):
        torch.empty(size, dtype=torch.uint8, device="cuda")
