# SPDX-License-Identifier: Apache-2.0
"""The fused ops against the same mathematics written with PyTorch's own operations.

    python bench/bench_ops.py [--json FILE] [--runs N]

expert_mlp forward against sort, gather, torch.nn.functional.grouped_mm, SwiGLU and scatter;
norm_topk forward and backward against the eager formula. Results are compared before the timing.
"""

import argparse
from collections.abc import Callable
from pathlib import Path

import torch
from harness import as_result, interleave, require_close, write_json
from torch import Tensor
from torch.nn import functional as F
from workloads import named

from unipool.nn.router import norm_router_calibration
from unipool.ops import Routing, expert_mlp, norm_topk

W = named("cpu")
T, D, FF, M, K = W.tokens, W.d_model, W.d_ff, W.experts, W.top_k
BOUNDS = {torch.float32: 1e-5, torch.bfloat16: 2e-2}


def grouped_mm_layer(x: Tensor, routing: Routing, gate_up: Tensor, down: Tensor) -> Tensor:
    """The layer as one writes it with torch's grouped_mm: silent slots go to expert 0, weight 0."""
    flat = routing.experts.flatten().clamp(min=0)
    order = flat.argsort(stable=True)
    offsets = flat.bincount(minlength=gate_up.shape[0]).cumsum(0).int()
    rows = x[order // routing.experts.shape[1]]
    hidden = F.grouped_mm(rows, gate_up.transpose(1, 2), offs=offsets)
    gate, up = hidden.chunk(2, dim=-1)
    y = F.grouped_mm(F.silu(gate) * up, down.transpose(1, 2), offs=offsets)
    y = y * routing.weights.flatten()[order, None].to(y.dtype)
    return torch.zeros_like(x).index_add_(0, order // routing.experts.shape[1], y)


def eager_norm_topk(logits: Tensor, scale: Tensor, top_k: int, calibration: float) -> Routing:
    """The formula, operation by operation."""
    norm = logits.norm(dim=-1, keepdim=True)
    scores = scale * calibration * F.relu(logits / (norm + 1e-8))
    weights, experts = scores.topk(top_k, dim=-1)
    load = experts.flatten().bincount(minlength=logits.shape[1]).int()
    return Routing(weights, experts.int(), load, scores.sum(0))


def bench_expert_mlp(dtype: torch.dtype, runs: int) -> dict:
    x = torch.randn(T, D, dtype=dtype)
    gate_up = torch.randn(M, 2 * FF, D, dtype=dtype) / D**0.5
    down = torch.randn(M, D, FF, dtype=dtype) / FF**0.5
    routing = norm_topk(torch.randn(T, M), torch.ones(()), K)
    arguments = (x, routing, gate_up, down)
    name = f"expert_mlp forward {str(dtype).removeprefix('torch.')}"
    with torch.no_grad():
        require_close(name, expert_mlp(*arguments), grouped_mm_layer(*arguments), BOUNDS[dtype])
        ways = {
            "unipool": lambda: expert_mlp(*arguments),
            "grouped_mm": lambda: grouped_mm_layer(*arguments),
        }
        return compare(name, ways, runs)


def bench_norm_topk(runs: int) -> dict:
    logits = torch.randn(T, M, requires_grad=True)
    scale = torch.ones((), requires_grad=True)
    calibration = norm_router_calibration(M, K)
    grad_weights, grad_importance = torch.randn(T, K), torch.randn(M)

    def step(route: Callable[[], Routing]) -> tuple[Tensor, Tensor]:
        routing = route()
        outputs, grads = (routing.weights, routing.importance), (grad_weights, grad_importance)
        return torch.autograd.grad(outputs, (logits, scale), grads)

    ways = {
        "unipool": lambda: step(lambda: norm_topk(logits, scale, K, calibration=calibration)),
        "eager": lambda: step(lambda: eager_norm_topk(logits, scale, K, calibration)),
    }
    name = "norm_topk forward+backward"
    for got, wanted in zip(ways["unipool"](), ways["eager"](), strict=True):
        require_close(name, got, wanted, BOUNDS[torch.float32])
    return compare(name, ways, runs)


def compare(name: str, ways: dict[str, Callable[[], object]], runs: int) -> dict:
    ours, theirs = interleave(ways, warmup=5, runs=runs)
    ratio = theirs.median / ours.median
    print(f"{name}  T={T} D={D} F={FF} M={M} k={K}")
    print(f"  {ours}\n  {theirs}\n  ratio {ratio:.2f}x")
    case = {"case": name, "T": T, "D": D, "F": FF, "M": M, "k": K}
    return as_result(case, [ours, theirs], ratio=ratio)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    parser.add_argument("--runs", type=int, default=50, help="counted runs of each way")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    results = [
        bench_expert_mlp(torch.float32, arguments.runs),
        bench_expert_mlp(torch.bfloat16, arguments.runs),
        bench_norm_topk(arguments.runs),
    ]
    if arguments.json:
        write_json(arguments.json, results)


if __name__ == "__main__":
    main()
