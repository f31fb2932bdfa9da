# SPDX-License-Identifier: Apache-2.0
"""Error of a pool's bfloat16 weight gradient over L layers, against the float64 sum.

    python bench/wgrad_precision.py [--json FILE]

The operands of every layer are the same bfloat16 tensors in all ways: deferred forms one product
over all layers, accumulate adds layer by layer in float32, autograd adds L bfloat16 gradients.
"""

import argparse
from pathlib import Path

import torch
from harness import relative_error, write_json
from torch import Tensor

from unipool.ops import dispatch_plan

T, M, K, N_OUT, D = 512, 16, 1, 64, 32
LAYERS = (12, 24, 48)
_ops = torch.ops.unipool


def layer() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(grad [T k, n], input [T, D], order, offsets) of one layer's weight gradient."""
    plan = dispatch_plan(torch.randint(0, M, (T, K), dtype=torch.int32), M)
    grad, x = torch.randn(T * K, N_OUT), torch.randn(T, D)
    return grad.bfloat16(), x.bfloat16(), plan.order, plan.offsets


def errors(layers: int) -> dict[str, float]:
    segments = [layer() for _ in range(layers)]
    columns = [list(column) for column in zip(*segments, strict=True)]
    exact = torch.zeros(M, N_OUT, D, dtype=torch.float64)
    summed = torch.zeros(M, N_OUT, D)
    added = torch.zeros(M, N_OUT, D, dtype=torch.bfloat16)
    for segment in segments:
        one = [[t] for t in segment]
        exact += _ops.grouped_wgrad([one[0][0].double()], [one[1][0].double()], *one[2:], 0, K)
        _ops.grouped_wgrad_(summed, *one, 0, K)
        added += _ops.grouped_wgrad(*one, 0, K)
    return {
        "deferred": relative_error(_ops.grouped_wgrad(*columns, 0, K), exact),
        "accumulate": relative_error(summed.bfloat16(), exact),
        "autograd": relative_error(added, exact),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    results = []
    for layers in LAYERS:
        error = errors(layers)
        ratio = error["autograd"] / error["deferred"]
        shown = "  ".join(f"{name} {value:.2e}" for name, value in error.items())
        print(f"L={layers:<3} {shown}  autograd / deferred {ratio:.1f}x")
        results.append({"case": "bfloat16 weight gradient", "layers": layers, "error": error})
    if arguments.json:
        write_json(arguments.json, results)


if __name__ == "__main__":
    main()
