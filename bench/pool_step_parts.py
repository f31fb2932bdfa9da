# SPDX-License-Identifier: Apache-2.0
"""Where the time of a pool step goes on the CPU: the share of each group of ops.

    python bench/pool_step_parts.py [--json FILE]

Processor time of every op of the step of bench/pool_step.py, with weight gradients deferred, on one
thread: other programs on the machine then change the shares little. Median over the steps.
"""

import argparse
import statistics
import time
from collections import defaultdict
from pathlib import Path

import torch
from harness import write_json
from pool_step import PoolStep, Shape
from torch.utils._python_dispatch import TorchDispatchMode

SHAPE = Shape(layers=12, tokens=2048, d_model=256, d_ff=1024, experts=96, top_k=1)
PARTS = {
    "forward": ("expert_mlp",),
    "input gradients": ("expert_mlp_bwd", "expert_mlp_bwd_"),
    "weight gradients": ("grouped_wgrad", "grouped_wgrad_"),
    "routers": ("router_logits", "norm_topk", "router_logits_bwd", "norm_topk_bwd"),
    "dispatch plans": ("dispatch_plan",),
}
REST = "all else"


class OpTimes(TorchDispatchMode):
    """Processor seconds of every op that is called, by part."""

    def __init__(self) -> None:
        super().__init__()
        self.seconds: dict[str, float] = defaultdict(float)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        start = time.process_time()
        result = func(*args, **(kwargs or {}))
        self.seconds[part_of(func)] += time.process_time() - start
        return result


def part_of(func: torch._ops.OpOverload) -> str:
    if func.namespace != "unipool":
        return REST
    name = func._opname
    return next((part for part, names in PARTS.items() if name in names), REST)


def measure(dtype: torch.dtype, steps: int) -> dict[str, float]:
    """The share of each part in the time of all ops, in [0, 1]; together 1 but for the medians."""
    torch.manual_seed(0)
    model = PoolStep(SHAPE, dtype, "cpu")
    x = torch.randn(SHAPE.tokens, SHAPE.d_model).to(dtype).requires_grad_()
    grad = torch.randn_like(x)
    shares = defaultdict(list)
    for step in range(steps + 1):
        model.zero_grad()
        with OpTimes() as times:
            model(x, model.ours("deferred")).backward(grad)
        if step > 0:  # the first one warms up
            total = sum(times.seconds.values())
            for part in (*PARTS, REST):
                shares[part].append(times.seconds[part] / total)
    return {part: statistics.median(values) for part, values in shares.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=15, help="counted steps")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    results = []
    for dtype in (torch.float32, torch.bfloat16):
        name = str(dtype).removeprefix("torch.")
        share = measure(dtype, arguments.steps)
        print(f"{name:<9}" + "  ".join(f"{part} {value:.1%}" for part, value in share.items()))
        results.append({"case": "pool step", "dtype": name, **vars(SHAPE), "share": share})
    if arguments.json:
        write_json(arguments.json, results)


if __name__ == "__main__":
    main()
