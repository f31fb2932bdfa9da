# SPDX-License-Identifier: Apache-2.0
"""The matrix products of the CPU backend at the edges of their blocks, in every instruction set.

Sums of small integers are exact in float32, so each result must equal the float64 one, rounded: a
block that is skipped, doubled or misplaced cannot hide in a tolerance.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from unipool import reference

_ops = torch.ops.unipool
DTYPES = [torch.float32, torch.float64, torch.bfloat16]
ISAS = ["baseline", "avx2", "avx512", "avx512_bf16"]  # UNIPOOL_CPU_ISA, but for amx
# Rows of each expert: every remainder of the register tiles, none, and more than a task takes.
ROWS = [1, 2, 3, 4, 5, 0, 7, 12, 13, 16, 25, 37, 127, 129]
# Columns and depth of the weights: below, at and beyond every block, odd and even.
SIZES = [(1, 1), (15, 31), (16, 32), (17, 33), (70, 1061), (300, 129), (257, 258), (33, 2050)]
WGRAD_ROWS = [1, 2, 255, 257, 319, 320, 321, 0, 641]  # of an expert, over three segments


def integers(*shape: int, seed: int, dtype: torch.dtype) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-3, 4, shape, generator=generator).to(dtype)


def bounds(rows: list[int]) -> torch.Tensor:
    return torch.tensor([0, *rows], dtype=torch.int32).cumsum(0, dtype=torch.int32)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n", "k"), SIZES)
def test_rows_times_weights(n: int, k: int, dtype: torch.dtype) -> None:
    offsets = bounds(ROWS)
    a = integers(int(offsets[-1]), k, seed=1, dtype=dtype)
    grad = integers(int(offsets[-1]), n, seed=2, dtype=dtype)
    b = integers(len(ROWS), n, k, seed=3, dtype=dtype)
    due = reference.grouped_mm(a.double(), b.double(), offsets)
    assert torch.equal(_ops.grouped_mm(a, b, offsets), due.to(dtype))
    due = reference.grouped_mm(grad.double(), b.double().mT, offsets)
    assert torch.equal(_ops.grouped_mm_bwd_a(grad, b, offsets), due.to(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n", "k"), [(1, 1), (13, 33), (257, 31), (530, 96)])
def test_weight_gradient(n: int, k: int, dtype: torch.dtype) -> None:
    parts = [[(rows + layer) // 3 for rows in WGRAD_ROWS] for layer in range(3)]
    offsets = [bounds(part) for part in parts]
    grads = [integers(sum(part), n, seed=i, dtype=dtype) for i, part in enumerate(parts)]
    inputs = [integers(sum(part), k, seed=9 + i, dtype=dtype) for i, part in enumerate(parts)]
    due = torch.zeros(len(WGRAD_ROWS), n, k, dtype=torch.float64)
    for g, x, o in zip(grads, inputs, offsets, strict=True):
        for e in range(len(WGRAD_ROWS)):
            rows = slice(int(o[e]), int(o[e + 1]))
            due[e] += g[rows].double().T @ x[rows].double()
    acc = torch.float64 if dtype == torch.float64 else torch.float32
    for out_dtype in {dtype, acc}:
        got = _ops.grouped_wgrad(grads, inputs, [], offsets, 0, 0, out_dtype)
        assert torch.equal(got, due.to(out_dtype))
    total = torch.ones(due.shape, dtype=acc)
    _ops.grouped_wgrad_(total, grads, inputs, [], offsets, 0, 0)
    assert torch.equal(total, due.to(acc) + 1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("tokens", "experts", "width"), [(129, 13, 65), (641, 12, 258), (3, 96, 7)]
)
def test_router_logits(tokens: int, experts: int, width: int, dtype: torch.dtype) -> None:
    x = integers(tokens, width, seed=1, dtype=dtype)
    weight = integers(experts, width, seed=2, dtype=dtype)
    acc = torch.promote_types(dtype, torch.float32)
    grad = integers(tokens, experts, seed=3, dtype=acc) * 341  # 10 bits: two bfloat16 numbers
    got = (_ops.router_logits(x, weight), *_ops.router_logits_bwd(grad, x, weight))
    z, g, w = x.double(), grad.double(), weight.double()
    for actual, due in zip(got, (z @ w.T, g @ w, g.T @ z), strict=True):
        assert torch.equal(actual, due.to(actual.dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_mlp_forward_and_backward(dtype: torch.dtype) -> None:
    """In the instruction set at hand; gates of 0 or far from it make SwiGLU exact but for up."""
    tokens, experts, d_model, d_ff = 61, 3, 33, 70
    gate_up = integers(experts, 2 * d_ff, d_model, seed=4, dtype=dtype) / 64
    down = integers(experts, d_model, d_ff, seed=5, dtype=dtype) / 64
    x, grad = (integers(tokens, d_model, seed=s, dtype=dtype) for s in (6, 7))
    ids = torch.randint(0, experts, (tokens, 1), generator=torch.Generator().manual_seed(8))
    plan = reference.dispatch_plan(ids.int(), experts)
    weights = torch.full((tokens, 1), 0.5, dtype=torch.promote_types(dtype, torch.float32))
    y, preact = _ops.expert_mlp(x, weights, gate_up, down, *plan, True)
    got = _ops.expert_mlp_bwd(grad, weights, gate_up, down, *plan, preact)

    order = plan.order.long()
    z = reference.grouped_mm(x[order].double(), gate_up.double(), plan.offsets)
    gate, up = preact.double().chunk(2, -1)
    s = gate.sigmoid()
    hidden = 0.5 * gate * s * up
    d_hidden = 0.5 * reference.grouped_mm(grad[order].double(), down.double().mT, plan.offsets)
    d_preact = torch.cat([d_hidden * up * (s + gate * s * (1 - s)), d_hidden * gate * s], -1)
    d_x = reference.grouped_mm(d_preact, gate_up.double().mT, plan.offsets)
    tolerance = 4 * torch.finfo(dtype).eps
    for name, actual, due in [
        ("preact", preact, z),
        ("y", y[order], reference.grouped_mm(hidden, down.double(), plan.offsets)),
        ("hidden", got[3], hidden),
        ("grad_preact", got[2], d_preact),
        ("grad_x", got[0][order], d_x),
        ("grad_weights", got[1][order, 0], 2 * (d_hidden * hidden / 0.5).sum(1)),
    ]:
        error = (actual.double() - due).abs().max() / due.abs().max()
        assert error < tolerance, f"{name}: {error}"


@pytest.mark.parametrize("isa", ISAS)
def test_every_instruction_set(isa: str) -> None:
    """The tests above with the processor's abilities limited, in a process of their own."""
    command = [sys.executable, "-m", "pytest", "-q", "-n", "0", "-p", "no:cacheprovider"]
    run = subprocess.run(
        [*command, __file__, "-k", "not instruction_set"],
        env={**os.environ, "UNIPOOL_CPU_ISA": isa},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout[-3000:]
    assert "passed" in run.stdout


def test_an_unknown_instruction_set_is_refused() -> None:
    code = "import torch, unipool; unipool.ops.norm_topk(torch.ones(1, 2), torch.ones(()), 1)"
    run = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "UNIPOOL_CPU_ISA": "sse"},
        capture_output=True,
        text=True,
    )
    assert run.returncode != 0
    assert "UNIPOOL_CPU_ISA must be baseline, avx2, avx512" in run.stderr.splitlines()[-1]
