# SPDX-License-Identifier: Apache-2.0
"""The ops of UniPool on the fake GPU against the CPU, forward and backward; the stream that each
launch used, and waits for the device. Run from the project's folder:

    python .../run.py python .../check_ops.py
"""

import sys
import time

import torch

import softgpu
import unipool.ops as ops

T, M, D, F, K = 96, 8, 64, 32, 2
failures = 0


def compare(name: str, make, dtype: torch.dtype) -> None:
    """make(device, values) -> results; its gradients too."""
    global failures

    def inputs(device: str, of: torch.dtype) -> dict[str, torch.Tensor]:
        torch.manual_seed(0)
        values = {
            "logits": torch.randn(T, M),
            "x": torch.randn(T, D),
            "router": torch.randn(M, D) / 8,
            "gate_up": torch.randn(M, 2 * F, D) / 8,
            "down": torch.randn(M, D, F) / 6,
        }
        values = {k: v.to(dtype).to(device, of) for k, v in values.items()}
        values["scale"] = torch.tensor(1.5, device=device)
        return {k: v.requires_grad_() for k, v in values.items()}

    def run(values: dict[str, torch.Tensor]):
        results = [r for r in make(values) if isinstance(r, torch.Tensor)]
        loss = sum((r.float() ** 2).sum() for r in results if r.is_floating_point())
        if isinstance(loss, torch.Tensor) and loss.requires_grad:
            loss.backward()
        return results, {k: v.grad for k, v in values.items() if v.grad is not None}

    began = time.time()
    want, want_grads = run(inputs("cpu", torch.float32))
    values = inputs("cuda", dtype)
    try:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with softgpu.calls() as calls, torch.cuda.stream(stream):
            got, got_grads = run(values)
    except Exception as error:
        failures += 1
        print(f"FAIL {name} {dtype}: {str(error).splitlines()[0][:150]}", flush=True)
        return
    tolerance = 1e-4 if dtype == torch.float32 else 4e-2
    worst = 0.0
    torch.cuda.synchronize()
    grads = [(want_grads[k], got_grads[k]) for k in want_grads]
    for a, b in [*zip(want, got, strict=True), *grads]:
        a, b = a.detach().double(), b.detach().cpu().double()
        error = float((a - b).abs().max() / (1 + a.abs().max()))
        worst = max(worst, error if error == error else float("inf"))
    launches = [c for c in calls if c["call"] == "launch"]
    waits = [c for c in calls if "synchronize" in c["call"] or c.get("kind") == "d2h"]
    streams = {c["stream"] for c in launches}
    current = {str(softgpu.number(stream))}
    threads = {c["thread"] for c in launches}
    fine = worst < tolerance
    failures += not fine
    print(
        f"{'ok  ' if fine else 'FAIL'} {name} {dtype}: error {worst:.1e}, {len(launches)} launches "
        f"{'on the current stream' if streams <= current else f'ON STREAMS {streams}'}, "
        f"{len(threads)} threads, {len(waits)} waits, {time.time() - began:.1f} s",
        flush=True,
    )


def routing(v):
    return ops.norm_topk(v["logits"], v["scale"], K, calibration=0.5)


def plan(v):
    return ops.dispatch_plan(routing(v).experts, M)


CASES = {
    "router_logits": lambda v: [ops.router_logits(v["x"], v["router"])],
    "norm_topk": lambda v: routing(v),
    "softmax_topk": lambda v: ops.softmax_topk(v["logits"], K),
    "dispatch_plan": lambda v: plan(v),
    "permute": lambda v: [ops.permute(v["x"], plan(v))],
    "unpermute": lambda v: [
        ops.unpermute(ops.permute(v["x"], plan(v)), plan(v), routing(v).weights)
    ],
    "grouped_mm": lambda v: [
        ops.grouped_mm(ops.permute(v["x"], plan(v)), v["gate_up"], plan(v).offsets)
    ],
    "expert_mlp": lambda v: [ops.expert_mlp(v["x"], routing(v), v["gate_up"], v["down"])],
}

if __name__ == "__main__":
    for wanted in sys.argv[1:] or CASES:
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            compare(wanted, CASES[wanted], dtype)
    print(f"{failures} failures")
    sys.exit(failures > 0)
