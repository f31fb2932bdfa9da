# SPDX-License-Identifier: Apache-2.0
"""Faults of a host, planted one at a time: each is the error that CUDA gives, and one line on
stderr that names the kernel or the call, and the reason."""

import ctypes
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import planted
import pytest
import torch
from planted import Planted

pytestmark = planted.needs_softgpu

OK = "cudaSuccess"
BLOCKING, NON_BLOCKING = 0, 1
GLOBAL, THREAD_LOCAL, RELAXED = 0, 1, 2


@pytest.fixture(scope="module")
def kernels() -> Planted:
    return Planted(planted.build())


@pytest.fixture
def says(capfd: pytest.CaptureFixture) -> Callable[..., None]:
    """Checks that stderr has one line since the last time, with these words; none: no line."""

    def check(*words: str) -> None:
        lines = capfd.readouterr().err.splitlines()
        assert len(lines) == bool(words), lines
        for word in words:
            assert lines[0].startswith("softgpu: ")
            assert word in lines[0], f"{word!r} is not in {lines[0]!r}"

    capfd.readouterr()
    return check


@pytest.fixture
def uncached() -> Iterator[None]:
    """torch asks the runtime for every tensor, and gives it back at once."""
    torch.cuda.caching_allocator_enable(False)
    yield
    torch.cuda.caching_allocator_enable(True)


def memory(n: int = 1024) -> torch.Tensor:
    return torch.zeros(n, dtype=torch.int32, device="cuda")


class Handle:
    """A stream or an event made by the runtime's own function."""

    def __init__(self, kernels: Planted, function: str, *flags: object) -> None:
        self.handle = ctypes.c_void_p()
        assert kernels.call(function, ctypes.byref(self.handle), *flags) == OK

    @property
    def value(self) -> int:
        return self.handle.value


def new_stream(kernels: Planted, flags: int = NON_BLOCKING) -> int:
    return Handle(kernels, "cudaStreamCreateWithFlags", flags).value


def new_event(kernels: Planted) -> int:
    return Handle(kernels, "cudaEventCreate").value


# --- launches


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


# --- memory


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


# --- streams and events


def test_a_destroyed_stream(kernels, says):
    stream, event = new_stream(kernels), new_event(kernels)
    assert kernels.call("cudaStreamDestroy", stream) == OK
    says()
    failing = [
        lambda: kernels.launch("fill", memory(), 1, 1, stream=stream),
        lambda: kernels.call("cudaStreamSynchronize", stream),
        lambda: kernels.call("cudaEventRecord", event, stream),
        lambda: kernels.call("cudaStreamWaitEvent", stream, event, 0),
        lambda: kernels.call("cudaStreamDestroy", stream),
    ]
    for call in failing:
        assert call() == "cudaErrorInvalidResourceHandle"
        says("which was destroyed")


def test_a_destroyed_event(kernels, says):
    stream, event = new_stream(kernels), new_event(kernels)
    assert kernels.call("cudaEventDestroy", event) == OK
    for function, *args in (
        ("cudaEventRecord", event, stream),
        ("cudaStreamWaitEvent", stream, event, 0),
        ("cudaEventSynchronize", event),
        ("cudaEventQuery", event),
        ("cudaEventDestroy", event),
    ):
        assert kernels.call(function, *args) == "cudaErrorInvalidResourceHandle"
        says(f"{function} with an event that was destroyed")


def test_the_time_of_an_event_that_was_not_recorded(kernels, says):
    first, last = new_event(kernels), new_event(kernels)
    ms = ctypes.c_float()
    kernels.call("cudaEventRecord", first, new_stream(kernels))
    error = kernels.call("cudaEventElapsedTime", ctypes.byref(ms), first, last)
    assert error == "cudaErrorInvalidResourceHandle"
    says("cudaEventElapsedTime of an event that was not recorded")


# --- captures


@pytest.fixture
def capture(kernels) -> Iterator[Callable[[int], int]]:
    """Begins a capture in a mode, and returns its stream; ends it at last."""
    captured: list[int] = []

    def begin(mode: int = GLOBAL) -> int:
        captured.append(new_stream(kernels))
        assert kernels.call("cudaStreamBeginCapture", captured[-1], mode) == OK
        return captured[-1]

    yield begin
    graph = ctypes.c_void_p()
    for stream in captured:
        kernels.call("cudaStreamEndCapture", stream, ctypes.byref(graph))


def end(kernels: Planted, stream: int) -> tuple[str, int | None]:
    graph = ctypes.c_void_p()
    return kernels.call("cudaStreamEndCapture", stream, ctypes.byref(graph)), graph.value


@pytest.mark.parametrize(
    "function", ["cudaDeviceSynchronize", "cudaMalloc", "cudaFree", "cudaMemcpy"]
)
def test_a_call_that_a_capture_does_not_allow(kernels, capture, says, function):
    arguments = {
        "cudaDeviceSynchronize": (),
        "cudaMalloc": (ctypes.byref(ctypes.c_void_p()), 100),
        "cudaFree": (0,),
        "cudaMemcpy": (0, 0, 0, 0),
    }[function]
    stream = capture()
    assert kernels.call(function, *arguments) == "cudaErrorStreamCaptureUnsupported"
    says(f"{function} while a stream is captured")
    assert end(kernels, stream) == ("cudaErrorStreamCaptureInvalidated", None)


def test_a_wait_for_the_captured_stream(kernels, capture, says):
    for function in ("cudaStreamSynchronize", "cudaStreamQuery"):
        stream = capture(RELAXED)
        assert kernels.call(function, stream) == "cudaErrorStreamCaptureUnsupported"
        says(f"{function} while the stream is captured")
        assert end(kernels, stream) == ("cudaErrorStreamCaptureInvalidated", None)


def test_a_wait_for_a_captured_event(kernels, capture, says):
    event = new_event(kernels)
    for function in ("cudaEventSynchronize", "cudaEventQuery"):
        stream = capture()
        assert kernels.call("cudaEventRecord", event, stream) == OK
        assert kernels.call(function, event) == "cudaErrorCapturedEvent"
        says(f"{function} while the stream is captured")
        assert end(kernels, stream) == ("cudaErrorStreamCaptureInvalidated", None)


def test_work_of_the_default_stream_in_a_capture(kernels, capture, says):
    """It would be missing in the graph."""
    to, event = memory(), new_event(kernels)
    stream = capture()
    assert kernels.launch("fill", to, 1, 1, stream=0) == "cudaErrorStreamCaptureImplicit"
    says("fill(int*, int, int) in the default stream while another stream is captured")
    end(kernels, stream)
    stream = capture()
    kernels.call("cudaEventRecord", event, stream)
    error = kernels.call("cudaStreamWaitEvent", 0, event, 0)
    assert error == "cudaErrorStreamCaptureImplicit"
    says("cudaStreamWaitEvent in the default stream for an event of a capture")
    assert end(kernels, stream) == ("cudaErrorStreamCaptureInvalidated", None)


def test_an_event_from_outside_of_a_capture(kernels, capture, says):
    event = new_event(kernels)
    kernels.call("cudaEventRecord", event, new_stream(kernels))
    error = kernels.call("cudaStreamWaitEvent", capture(), event, 0)
    assert error == "cudaErrorStreamCaptureIsolation"
    says("in a capture for an event from outside of it")


def test_a_branch_that_is_not_joined(kernels, capture, says):
    def branch(join: bool) -> str:
        origin, side = capture(), new_stream(kernels)
        event, back = new_event(kernels), new_event(kernels)
        kernels.call("cudaEventRecord", event, origin)
        kernels.call("cudaStreamWaitEvent", side, event, 0)
        kernels.launch("fill", to, 1024, 3, grid=(32, 1, 1), stream=side)
        if join:
            kernels.call("cudaEventRecord", back, side)
            kernels.call("cudaStreamWaitEvent", origin, back, 0)
        return end(kernels, origin)[0]

    to = memory()
    assert branch(join=True) == OK
    says()
    assert branch(join=False) == "cudaErrorStreamCaptureUnjoined"
    says("its first stream does not wait for")


def test_a_capture_of_the_default_stream(kernels, says):
    error = kernels.call("cudaStreamBeginCapture", 0, GLOBAL)
    assert error == "cudaErrorStreamCaptureUnsupported"
    says("capture of the default stream")


def test_a_graph_runs_what_was_captured_when_it_is_launched(kernels, capture):
    to = memory()
    stream = capture()
    kernels.launch("fill", to, 1024, 3, grid=(32, 1, 1), stream=stream)
    error, graph = end(kernels, stream)
    assert error == OK
    assert to.eq(0).all()
    exec_ = ctypes.c_void_p()
    kernels.call("cudaGraphInstantiate", ctypes.byref(exec_), graph, ctypes.c_ulonglong(0))
    kernels.call("cudaGraphLaunch", exec_, stream)
    assert to.eq(3).all()


# --- the runtime itself


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


# --- two devices, in a process that has them


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
