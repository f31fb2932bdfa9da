# SPDX-License-Identifier: Apache-2.0
"""Faults of a host with two devices, and that the ops run on the device of their tensors.
test_runtime_faults.py runs this file in a process with two (SOFTGPU_DEVICES=2)."""

import ctypes

import planted
import pytest
import softgpu_ops
import torch
from cases import Case
from softgpu_ops import Step
from specs import SPECS, to_device

from unipool import ops

if softgpu_ops.softgpu:
    import softgpu

pytestmark = [
    planted.needs_softgpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one device: SOFTGPU_DEVICES=2"),
]

OK = "cudaSuccess"


def memory(device: int) -> torch.Tensor:
    return torch.zeros(64, dtype=torch.int32, device=f"cuda:{device}")


def last_line(capfd: pytest.CaptureFixture) -> str:
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == 1
    return lines[0]


def test_a_stream_of_another_device(kernels, capfd):
    stream = torch.cuda.Stream(device=1)
    error = kernels.launch("fill", memory(0), 64, 1, stream=stream.cuda_stream)
    assert error == "cudaErrorInvalidResourceHandle"
    assert "fill(int*, int, int): device 0 is current, the stream is of 1" in last_line(capfd)


def test_a_pointer_of_another_device(kernels, capfd):
    with torch.cuda.device(1):
        error = kernels.launch("copy", memory(0), memory(1), 64)
    assert error == "cudaErrorIllegalAddress"
    line = last_line(capfd)
    assert "copy(int const*, int*, int) on device 1 gets memory of device 0 (word 0 of" in line


def test_a_missing_device_guard(kernels, capfd):
    """An op that launches on the default stream without making its tensors' device current."""
    to = memory(1)
    assert kernels.launch("fill", to, 64, 1, stream=0) == "cudaErrorIllegalAddress"
    assert "fill(int*, int, int) on device 0 gets memory of device 1" in last_line(capfd)
    with torch.cuda.device_of(to):
        assert kernels.launch("fill", to, 64, 1, stream=0) == OK


def test_an_event_of_another_device(kernels, capfd):
    event = ctypes.c_void_p()
    kernels.call("cudaEventCreate", ctypes.byref(event))
    stream = torch.cuda.Stream(device=1)
    error = kernels.call("cudaEventRecord", event, stream.cuda_stream)
    assert error == "cudaErrorInvalidResourceHandle"
    assert "event of device 0 recorded in a stream of 1" in last_line(capfd)
    other = torch.cuda.Stream(device=0)
    assert kernels.call("cudaEventRecord", event, other.cuda_stream) == OK
    assert kernels.call("cudaStreamWaitEvent", stream.cuda_stream, event, 0) == OK


def test_a_device_that_is_not_there(kernels, capfd):
    assert kernels.call("cudaSetDevice", ctypes.c_int(2)) == "cudaErrorInvalidDevice"
    assert "cudaSetDevice: device 2 of 2" in last_line(capfd)


@pytest.mark.parametrize("dtype", softgpu_ops.DTYPES, ids=str)
@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_ops_run_on_the_device_of_their_tensors(spec, dtype):
    case = Case("two_devices", 33, 5, 2, 24, 16)
    due = Step(spec, case, dtype, "cuda:0")
    step = Step(spec, case, dtype, "cuda:1")
    stream = torch.cuda.Stream(device=1)
    stream.wait_stream(torch.cuda.current_stream(1))
    with torch.cuda.stream(stream), torch.cuda.device(0), softgpu_ops.quiet_calls() as calls:
        results = step.run()
    assert torch.cuda.current_device() == 0
    made = [c for c in calls if c["call"] in ("launch", "operation")]
    assert {(c["device"], c["stream"]) for c in made} == {("1", str(softgpu.number(stream)))}
    torch.cuda.synchronize(1)
    softgpu_ops.check_same(results, due.run())


def test_tensors_of_two_devices_are_refused():
    case = Case("two_devices", 33, 5, 2, 24, 16)
    for spec in SPECS:
        inputs = spec.inputs(case, torch.float32)
        here, there = (to_device(inputs, torch.device(f"cuda:{d}")) for d in (0, 1))
        tensors = [n for n, t in here.items() if t.is_cuda and t.dim() > 0]
        for name in tensors[1:]:
            with pytest.raises((ValueError, RuntimeError), match="device"):
                spec.call(ops, here | {name: there[name]})
