# SPDX-License-Identifier: Apache-2.0
"""What the host's side of the ops does, forward and backward, by the log of the runtime's calls:
streams, waits, threads and captures. Devices: test_runtime_two_devices.py."""

import threading

import planted
import pytest
import softgpu_ops
import torch
from cases import Case
from softgpu_ops import DTYPES, Step, check_same, quiet_calls
from specs import EXPERT_MLP, GROUPED_MM, NORM_TOPK, ROUTER_LOGITS, SPECS, UNPERMUTE_WEIGHTED

if softgpu_ops.softgpu:
    import softgpu

pytestmark = planted.needs_softgpu

CASE = Case("host", 33, 5, 2, 24, 16)
OTHER = Case("host", 33, 5, 2, 24, 16, seed=1)

every_op = pytest.mark.parametrize("spec", SPECS, ids=str)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def launches(calls: list[dict[str, str]]) -> list[dict[str, str]]:
    return [c for c in calls if c["call"] == "launch"]


@every_dtype
@every_op
def test_ops_launch_on_the_current_stream_and_never_wait(spec, dtype):
    step = Step(spec, CASE, dtype)
    due = step.run()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream), quiet_calls() as calls:
        results = step.run()
    made = [c for c in calls if c["call"] in ("launch", "operation")]
    assert launches(made) or spec is ROUTER_LOGITS, "no kernel of the project's ran"
    assert made
    assert {(c["device"], c["stream"]) for c in made} == {("0", str(softgpu.number(stream)))}
    stream.synchronize()
    check_same(results, due)


def test_the_log_has_waits_and_copies():
    """What the test above relies on."""
    x = torch.ones(4, device="cuda")
    for wait in (x.sum().item, x.cpu, x.nonzero, torch.cuda.synchronize):
        with pytest.raises(AssertionError), quiet_calls():
            wait()
    with quiet_calls():
        x.add_(1)


@every_dtype
@every_op
def test_ops_are_captured_whole(spec, dtype):
    """One graph of forward and backward; its replays follow new values, and another routing."""
    step, other = Step(spec, CASE, dtype), Step(spec, OTHER, dtype)
    due, due_other = step.run(), other.run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with softgpu.calls() as calls, torch.cuda.graph(graph):
        results = step.run()
    begun = [c["call"] for c in calls].index("begin_capture")  # torch waits before it
    assert all(c["captured"] == "1" for c in launches(calls))
    assert not [c for c in calls[begun:] if c["call"] in softgpu_ops.WAITS]
    graph.replay()
    check_same(results, due)
    with torch.no_grad():
        for name, value in other.inputs.items():
            step.inputs[name].copy_(value)
        for to, value in zip(step.upstream, other.upstream, strict=True):
            to.copy_(value)
    graph.replay()
    check_same(results, due_other)


@every_dtype
@pytest.mark.filterwarnings("ignore:The AccumulateGrad node")  # inputs are of the main stream
def test_three_threads_with_a_stream_each(dtype):
    specs = (NORM_TOPK, UNPERMUTE_WEIGHTED, GROUPED_MM, EXPERT_MLP)
    steps = [Step(spec, CASE, dtype) for spec in specs]
    due = [step.run() for step in steps]
    torch.cuda.synchronize()
    results: dict[int, list] = {}

    def work(i: int) -> None:
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            for _ in range(3):
                results[i] = [step.run() for step in steps]
        stream.synchronize()

    threads = [threading.Thread(target=work, args=(i,)) for i in range(3)]
    with softgpu.calls() as calls:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len({c["stream"] for c in launches(calls)}) == 3
    assert sorted(results) == [0, 1, 2]
    for result in results.values():
        for got, want in zip(result, due, strict=True):
            check_same(got, want)
