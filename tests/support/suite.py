# SPDX-License-Identifier: Apache-2.0
"""The suite that every op passes on every backend: results and gradients within their bounds of the
float64 oracle."""

import torch
from cases import BY_NAME, Case, plan
from specs import OpSpec, oracle, run, to_device
from tolerance import check_results

from unipool import ops

# T, M, k of the routers, around the edges of blocks.
ROUTER_SIZES = [(127, 3, 2), (128, 1, 1), (129, 160, 8), (1, 96, 16), (2, 384, 1), (300, 17, 16)]
# T, M, k, D, F of the expert products: around the edges of blocks, and where a size is 1.
EXPERT_SIZES = [
    (1, 1, 1, 1, 1),
    (1, 3, 3, 7, 5),
    (127, 3, 1, 33, 7),
    (128, 3, 2, 64, 32),
    (129, 2, 1, 100, 36),
    (5, 8, 8, 17, 130),
    (9, 1, 1, 1025, 3),
    (33, 16, 16, 8, 8),
    (70, 4, 2, 48, 257),
]


def check_against_oracle(
    spec: OpSpec,
    case: Case,
    dtype: torch.dtype,
    device: torch.device,
    inputs: dict[str, torch.Tensor] | None = None,
) -> None:
    """Forward and backward of `spec` on the inputs of `case`, or on those given."""
    inputs = spec.inputs(case, dtype) if inputs is None else inputs
    actual = run(spec, case, ops, to_device(inputs, device))
    check_results(spec, case, inputs, actual, oracle(spec, case, inputs), dtype)


def check_empty_experts(
    spec: OpSpec, results: tuple[str, ...], dtype: torch.dtype, device: torch.device
) -> None:
    """`results`, gradients of weights, are 0 for experts without rows, and only for those."""
    case = BY_NAME["ragged"]
    got = run(spec, case, ops, to_device(spec.inputs(case, dtype), device))
    counts = plan(case).offsets.diff()
    empty = (counts == 0).nonzero().flatten()
    assert 10 < empty.numel() < case.experts, "the case must have empty experts"
    for name in results:
        per_expert = got[name].cpu().flatten(1)
        assert per_expert[empty].eq(0).all(), name
        assert per_expert[counts > 0].ne(0).any(1).all(), name


def check_group_sizes(spec: OpSpec, dtype: torch.dtype, device: torch.device) -> None:
    """One expert with n rows for each n, beside one with a few: block edges of the products."""
    for T in range(1, 71, 3):
        case = Case(f"group{T}", T, 2, 1, 24, 40, routing="one")
        check_against_oracle(spec, case, dtype, device)
