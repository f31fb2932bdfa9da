# SPDX-License-Identifier: Apache-2.0
"""Faults of the host in streams, events and captures."""

import ctypes
from collections.abc import Callable, Iterator

import planted
import pytest
from planted import Planted
from runtime_handles import OK, Handle, memory

pytestmark = planted.needs_softgpu


BLOCKING, NON_BLOCKING = 0, 1

GLOBAL, THREAD_LOCAL, RELAXED = 0, 1, 2


def new_stream(kernels: Planted, flags: int = NON_BLOCKING) -> int:
    return Handle(kernels, "cudaStreamCreateWithFlags", flags).value


def new_event(kernels: Planted) -> int:
    return Handle(kernels, "cudaEventCreate").value


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
