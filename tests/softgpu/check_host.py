# SPDX-License-Identifier: Apache-2.0
"""Devices, threads and graphs: what the host's code of the ops does on the fake GPU.

python .../run.py SOFTGPU_DEVICES=2 python .../check_host.py [f32|bf16|f16]
"""

import sys
import threading

import torch

import softgpu
import unipool.ops as ops

T, M, D, F, K = 64, 4, 32, 16, 2
DTYPE = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}[
    sys.argv[1] if len(sys.argv) > 1 else "f32"
]


def values(device: str, seed: int = 0) -> list[torch.Tensor]:
    torch.manual_seed(seed)
    shapes = [(T, M), (T, D), (M, 2 * F, D), (M, D, F)]
    return [torch.randn(s).div(2).to(device, DTYPE).requires_grad_() for s in shapes]


def step(logits, x, gate_up, down):
    """A layer, forward and backward; the results of all ops."""
    routing = ops.softmax_topk(logits, K)
    y = ops.expert_mlp(x, routing, gate_up, down)
    plan = ops.dispatch_plan(routing.experts, M)
    z = ops.unpermute(ops.grouped_mm(ops.permute(x, plan), gate_up, plan.offsets), plan)
    grads = torch.autograd.grad(
        y.float().sum() + z.float().square().sum(), [logits, x, gate_up, down]
    )
    return [y, z, *grads]


def same(a, b) -> bool:
    return all(torch.equal(x.cpu(), y.cpu()) for x, y in zip(a, b, strict=True))


def check(what: str, fine: bool) -> None:
    print(f"{'ok  ' if fine else 'FAIL'} {what}", flush=True)


due = step(*values("cuda:0"))

if torch.cuda.device_count() > 1:
    inputs = values("cuda:1")
    with softgpu.calls() as calls:
        got = step(*inputs)
    launches = [c for c in calls if c["call"] == "launch"]
    check(
        f"tensors on cuda:1, cuda:0 current: {len(launches)} launches on devices "
        f"{ {c['device'] for c in launches} }",
        {c["device"] for c in launches} == {"1"} and same(due, got),
    )
    check("the current device is as before", torch.cuda.current_device() == 0)
    try:
        ops.permute(
            values("cuda:1")[1],
            ops.dispatch_plan(torch.zeros(T, 1, dtype=torch.int32, device="cuda:0"), M),
        )
        check("tensors of two devices are refused", False)
    except (ValueError, RuntimeError) as error:
        check(f"tensors of two devices are refused: {str(error).splitlines()[0][:90]}", True)

results: dict[int, list] = {}
wrong: list[str] = []


def work(i: int) -> None:
    with torch.cuda.stream(torch.cuda.Stream()):
        for _ in range(3):
            results[i] = step(*given[i])


given = [values("cuda:0") for _ in range(3)]  # one after the other: they set the seed
threads = [threading.Thread(target=work, args=(i,)) for i in range(3)]
for t in threads:
    t.start()
for t in threads:
    t.join()
check(
    "three threads, a stream each",
    len(results) == 3 and all(same(due, r) for r in results.values()),
)

inputs, other = values("cuda:0"), values("cuda:0", 7)
due_other = step(*other)
side = torch.cuda.Stream()
with torch.cuda.stream(side):
    step(*inputs)
torch.cuda.synchronize()
graph = torch.cuda.CUDAGraph()
with softgpu.calls() as calls, torch.cuda.graph(graph):
    captured = step(*inputs)
waits = [c for c in calls if "synchronize" in c["call"] and c["call"] != "device_synchronize"]
launches = [c for c in calls if c["call"] == "launch"]
check(
    f"graph: {len(launches)} launches, all captured; waits {waits}",
    all(c["captured"] == "1" for c in launches) and not waits,
)
graph.replay()
check("graph: replayed", same(due, captured))
with torch.no_grad():
    for a, b in zip(inputs, other, strict=True):
        a.copy_(b)
graph.replay()
check("graph: replayed with other values and another routing", same(due_other, captured))
