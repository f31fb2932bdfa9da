# SPDX-License-Identifier: Apache-2.0
"""Faults of the host in launches, and what the runtime says of them."""

import ctypes
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import planted
import pytest
import torch
from planted import Planted
from runtime_handles import OK, memory

pytestmark = planted.needs_softgpu


def test_a_launch_that_is_right_says_nothing(kernels, says):
    to = memory()
    assert kernels.launch("fill", to, 1024, 7, grid=(32, 1, 1)) == OK
    says()
    assert to.eq(7).all()


@pytest.mark.parametrize(
    ("threads", "error", "reason"),
    [
        ((1025, 1, 1), "cudaErrorInvalidConfiguration", "a block of 1025 x 1 x 1 threads"),
        ((33, 32, 1), "cudaErrorInvalidConfiguration", "a block of 33 x 32 x 1 threads"),
        ((1, 1, 65), "cudaErrorInvalidConfiguration", "a block of 1 x 1 x 65 threads"),
        ((0, 1, 1), "cudaErrorInvalidConfiguration", "a block of 0 x 1 x 1 threads"),
    ],
)
def test_too_many_threads(kernels, says, threads, error, reason):
    assert kernels.launch("fill", memory(), 0, 0, block=threads) == error
    says("fill(int*, int, int)", error, reason)


def test_more_threads_than_a_kernel_is_compiled_for(kernels, says):
    to = memory()
    assert kernels.launch("bounded", to, block=(64, 1, 1)) == OK
    assert kernels.launch("bounded", to, block=(65, 1, 1)) == "cudaErrorInvalidValue"
    says("bounded(int*): 65 threads, compiled for 64 (__launch_bounds__)")


def test_more_registers_than_a_multiprocessor_has(kernels, says):
    to = torch.ones(400, device="cuda")
    registers = kernels.attributes("greedy")["registers"]
    assert registers > 64
    error = kernels.launch("greedy", to, 4, block=(1024, 1, 1))
    assert error == "cudaErrorLaunchOutOfResources"
    says(f"greedy(float*, int): 1024 threads of {registers} registers")


@pytest.mark.parametrize(
    "grid",
    [(2**31, 1, 1), (1, 65536, 1), (1, 1, 65536), (0, 1, 1)],
    ids=lambda g: "x".join(map(str, g)),
)
def test_a_grid_that_is_too_large(kernels, says, grid):
    assert kernels.launch("fill", memory(), 0, 0, grid=grid) == "cudaErrorInvalidConfiguration"
    says("fill(int*, int, int): a grid of {} x {} x {} blocks".format(*grid))


def test_the_largest_grid_is_possible(kernels, says):
    assert kernels.launch("fill", memory(), 0, 0, grid=(1, 65535, 1), block=(1, 1, 1)) == OK
    says()


def test_dynamic_shared_memory_over_the_limit(kernels, says):
    """48 KiB with the static part, until the kernel opts in to more."""
    to, block = memory(), (1024, 1, 1)
    default = 44 * 1024
    assert kernels.launch("shared", to, block=block, smem=default) == OK
    assert kernels.launch("shared", to, block=block, smem=default + 1) == "cudaErrorInvalidValue"
    says(f"shared(int*): {default + 1} bytes of dynamic shared memory", "4096 are static")
    assert kernels.dynamic_limit("shared", 64 * 1024) == OK
    assert kernels.launch("shared", to, block=block, smem=64 * 1024) == OK
    error = kernels.launch("shared", to, block=block, smem=64 * 1024 + 1)
    assert error == "cudaErrorInvalidValue"
    says("shared(int*): 65537 bytes", "its limit is 65536")
    assert kernels.dynamic_limit("shared", default) == OK


def test_a_dynamic_limit_over_what_static_memory_leaves(kernels, says):
    """The launcher of expert_mlp once asked for all that a block can opt in to."""
    optin = torch.cuda.get_device_properties(0).shared_memory_per_block_optin
    assert kernels.dynamic_limit("fill", optin) == OK
    says()
    assert kernels.dynamic_limit("shared", optin) == "cudaErrorInvalidValue"
    says(
        f"shared(int*): MaxDynamicSharedMemorySize {optin}",
        f"4096 bytes of static shared memory leave {optin - 4096}",
    )
    assert kernels.dynamic_limit("shared", -1) == "cudaErrorInvalidValue"
    says("MaxDynamicSharedMemorySize -1")


def test_dynamic_memory_that_the_kernel_writes_but_the_launch_lacks(kernels, says):
    error = kernels.launch("shared", memory(), block=(1024, 1, 1), smem=4092)
    assert error == "cudaErrorLaunchFailure"
    says("shared(int*)", "shared memory: offset 8188 + 4 of 8188")


def test_an_unknown_kernel(kernels, says):
    assert kernels.launch(None) == "cudaErrorInvalidDeviceFunction"
    says("launch: 0x", "is no kernel")


def test_parameters_over_4_kib(kernels):
    """What CUDA 12.1 allows on compute capability 7.0 and later."""
    values = (ctypes.c_int * 2000)(*range(2000))
    to = memory(32)
    assert kernels.launch("large", values, to) == OK
    assert to.tolist() == list(range(1999, 1967, -1))


@pytest.fixture(scope="module")
def changed(tmp_path_factory: pytest.TempPathFactory) -> Callable[[bytes, bytes], Planted]:
    """The library with other PTX of the same length."""

    def change(old: bytes, new: bytes) -> Planted:
        assert len(old) == len(new)
        content = planted.build().read_bytes()
        assert old in content
        path = tmp_path_factory.mktemp("changed") / "planted.so"
        path.write_bytes(content.replace(old, new))
        return Planted(path)

    return change


def test_parameters_of_another_size(changed, says):
    name = b"_Z4fillPiii_param_2"
    kernels = changed(b".param .u32 " + name, b".param .u64 " + name)
    assert kernels.launch("fill", memory(), 1, 1) == "cudaErrorInvalidValue"
    says("fill(int*, int, int): 24 bytes of parameters in PTX, 16 in the cubin")


def test_a_kernel_that_the_ptx_lacks(changed, says):
    kernels = changed(b".entry _Z4fillPiii", b".entry _Z4fakePiii")
    assert kernels.launch("fill", memory(), 1, 1) == "cudaErrorInvalidDeviceFunction"
    says("fill(int*, int, int): not in the library's PTX")


def test_ptx_that_nobody_understands(changed, says):
    kernels = changed(b"mad.lo.s32", b"mad.xx.s32")
    assert kernels.launch("fill", memory(), 1, 1) == "cudaErrorInvalidPtx"
    says("fill(int*, int, int)", "mad.xx.s32")


@pytest.mark.parametrize(
    ("architectures", "compress", "reason"),
    [
        (
            "arch=compute_100a,code=[compute_100a,sm_100a]",
            "none",
            "no code for sm_90, only for sm_100a",
        ),
        ("arch=compute_120,code=compute_120", "none", "no code for sm_90, only for sm_120"),
        ("arch=compute_86,code=sm_86", "none", "no code for sm_90, only for sm_86"),
        (
            "arch=compute_90,code=sm_90",
            "none",
            "would run the cubin of sm_90, whose PTX is not there",
        ),
        (
            planted.DEFAULT,
            "size",
            "its device code is compressed: build with nvcc --compress-mode=none",
        ),
    ],
    ids=["other", "newer", "cubin", "no_ptx", "compressed"],
)
def test_a_kernel_without_code_for_the_device(says, architectures, compress, reason):
    kernels = Planted(planted.build(architectures, compress))
    assert kernels.launch("fill", memory(), 1, 1) == "cudaErrorNoKernelImageForDevice"
    says("fill(int*, int, int)", reason)


def test_a_function_that_is_not_written_says_its_name(kernels, says):
    assert kernels.call("cudaMallocManaged", 0, 0, 0) == "cudaErrorNotSupported"
    says("the software GPU does not provide cudaMallocManaged")


def test_errors_have_their_names_and_texts(kernels):
    name, text = kernels.runtime.cudaGetErrorName, kernels.runtime.cudaGetErrorString
    assert (name(0), text(0)) == (b"cudaSuccess", b"no error")
    assert (name(1), text(1)) == (b"cudaErrorInvalidValue", b"invalid argument")
    assert (name(2), text(2)) == (b"cudaErrorMemoryAllocation", b"out of memory")
    assert name(209) == b"cudaErrorNoKernelImageForDevice"
    assert name(719) == b"cudaErrorLaunchFailure"
    assert text(719) == b"unspecified launch failure"
    assert name(12345) == text(12345) == b"unrecognized error code"


def test_torch_raises_what_the_runtime_says(kernels, says):
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    torch.cuda.synchronize()
    with (
        pytest.raises(torch.AcceleratorError, match="previous error during capture"),
        torch.cuda.graph(graph, stream=stream),
    ):
        stream.synchronize()
    says("cudaStreamSynchronize while the stream is captured")


def test_two_devices():
    """And what the ops do with two."""
    if torch.cuda.device_count() > 1:
        pytest.skip("test_runtime_two_devices.py runs in this process")
    file = Path(__file__).with_name("test_runtime_two_devices.py")
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", file],
        env={**os.environ, "SOFTGPU_DEVICES": "2", "PYTEST_ADDOPTS": ""},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    assert " passed" in run.stdout
    assert "skipped" not in run.stdout
