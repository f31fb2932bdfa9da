# SPDX-License-Identifier: Apache-2.0
"""The dispatch kernels against float64, under several schedules with the checker on."""

import ctypes
from dataclasses import dataclass

import oracle
import pytest
import torch
from kernel_library import bits_equal, under_schedules
from launchers import MAX_SEGMENTS, Launchers, misaligned
from torch import Tensor

INT32 = torch.iinfo(torch.int32)


@dataclass(frozen=True)
class Case:
    """Tokens of each layer, experts, slots per token, and how ids are drawn."""

    tokens: tuple[int, ...]
    experts: int
    top_k: int
    routing: str = "uniform"

    def __str__(self) -> str:
        tokens = "+".join(map(str, self.tokens)) if len(self.tokens) < 5 else f"{len(self.tokens)}x"
        return f"T{tokens}-M{self.experts}-k{self.top_k}-{self.routing}"

    def ids(self) -> list[Tensor]:
        """One [T, k] int32 tensor per layer."""
        g = torch.Generator().manual_seed(sum(self.tokens) + self.experts)
        layers = []
        for tokens in self.tokens:
            ids = torch.randint(0, self.experts, (tokens, self.top_k), generator=g)
            if self.routing == "one":
                ids = torch.full_like(ids, self.experts // 2)
            if self.routing in ("dropped", "none"):
                bad = torch.tensor([-1, self.experts, INT32.min, INT32.max])
                bad = bad[torch.randint(0, 4, ids.shape, generator=g)]
                chance = 0.3 if self.routing == "dropped" else 1.0
                ids = torch.where(torch.rand(ids.shape, generator=g) < chance, bad, ids)
            layers.append(ids.int())
        return layers


CASES = [
    Case((0,), 4, 2),
    Case((1,), 1, 1),
    Case((127,), 3, 2),
    Case((128,), 96, 8),
    Case((129,), 160, 1),
    Case((300,), 384, 2, "dropped"),
    Case((64,), 1024, 16),
    Case((700,), 8, 1, "one"),
    Case((40,), 5, 2, "none"),
    Case((5, 0, 300, 1, 33), 96, 2),
    Case((0, 0), 96, 2),
    Case((3,) * MAX_SEGMENTS, 24, 2, "dropped"),
    Case((600, 600), 1024, 1),
]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
WIDTHS = [1, 7, 8, 24, 100, 768, 1032]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_plan(ops: Launchers, case: Case) -> None:
    layers = case.ids()
    results = under_schedules(lambda: ops.dispatch_plan(layers, case.experts))
    for got, want in zip(results, oracle.dispatch_plan(layers, case.experts), strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("slots", [528 * 512 - 1, 528 * 512, 528 * 512 + 1])
def test_plan_of_many_slots(ops: Launchers, slots: int) -> None:
    """Beyond 528 blocks of 512 slots the blocks grow."""
    ids = torch.randint(-1, 7, (slots, 1), generator=torch.Generator().manual_seed(0)).int()
    for got, want in zip(ops.dispatch_plan([ids], 6), oracle.dispatch_plan([ids], 6), strict=True):
        assert torch.equal(got, want)


def test_plan_refuses_what_it_cannot_do(ops: Launchers) -> None:
    ids = torch.zeros(1, 1, dtype=torch.int32)
    for experts in (0, 1025):
        with pytest.raises(RuntimeError, match=r"dispatch_plan: 1$"):  # cudaErrorInvalidValue
            ops.dispatch_plan([ids], experts)


def _plan(tokens: int, experts: int, top_k: int, routing: str) -> tuple[Tensor, Tensor]:
    """order [N], inverse [T, k]"""
    ids = Case((tokens,), experts, top_k, routing).ids()
    order, inverse, _ = oracle.dispatch_plan(ids, experts)
    return order, inverse.view(tokens, top_k)


def _normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def _cases(test):
    test = pytest.mark.parametrize("width", WIDTHS)(test)
    test = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])(test)
    routings = ["uniform", "dropped", "none"]
    return pytest.mark.parametrize(
        ("tokens", "top_k", "routing"),
        [(19, k, r) for k, r in zip((2, 3, 1), routings, strict=True)],
    )(test)


@_cases
def test_permute(ops, tokens, top_k, routing, dtype, width) -> None:
    order, _ = _plan(tokens, 6, top_k, routing)
    x = _normal(tokens, width, dtype=dtype)
    (y,) = under_schedules(lambda: ops.permute(x, order, top_k))
    want = torch.where((order >= 0).unsqueeze(1), x[order.clamp(min=0).long() // top_k], 0)
    assert bits_equal(y, want)


@_cases
def test_unpermute(ops, tokens, top_k, routing, dtype, width) -> None:
    _, inverse = _plan(tokens, 6, top_k, routing)
    y = _normal(tokens * top_k, width, dtype=dtype)
    for weights in (None, _normal(tokens, top_k, seed=1)):
        (out,) = under_schedules(lambda w=weights: ops.unpermute(y, inverse, w))
        weights64 = None if weights is None else weights.double()
        want = oracle.unpermute(y.double(), inverse, weights64)
        bound = 4 * torch.finfo(dtype).eps * want.abs() + 1e-6
        assert ((out.double() - want).abs() <= bound).all()
        assert (out[(inverse < 0).all(1)] == 0).all()


@_cases
def test_unpermute_bwd(ops, tokens, top_k, routing, dtype, width) -> None:
    order, inverse = _plan(tokens, 6, top_k, routing)
    y, grad = (
        _normal(tokens * top_k, width, dtype=dtype),
        _normal(tokens, width, seed=2, dtype=dtype),
    )
    weights = _normal(tokens, top_k, seed=1)
    grad_y, grad_weights = under_schedules(
        lambda: ops.unpermute_bwd(grad, y, order, inverse, weights)
    )
    y64, w64 = y.double().requires_grad_(), weights.double().requires_grad_()
    out = oracle.unpermute(y64, inverse, w64)
    want_y, want_w = torch.autograd.grad(out, [y64, w64], grad.double())
    unit = torch.finfo(dtype)
    assert ((grad_y.double() - want_y).abs() <= unit.eps * (want_y.abs() + unit.tiny)).all()
    size = (width**0.5) * 20
    assert (grad_weights.double() - want_w).abs().max() <= size * torch.finfo(torch.float32).eps
    assert (grad_weights[inverse < 0] == 0).all()
    assert (grad_y[order < 0] == 0).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
def test_misaligned_rows(ops: Launchers, dtype: torch.dtype) -> None:
    """Addresses one element behind a multiple of 16 bytes, in width where 16 bytes would fit."""
    order, inverse = _plan(9, 4, 2, "dropped")
    x, y = _normal(9, 64, dtype=dtype), _normal(18, 64, seed=1, dtype=dtype)
    grad, weights = _normal(9, 64, seed=2, dtype=dtype), _normal(9, 2, seed=3)
    calls = [
        (lambda x, y, g: ops.permute(x, order, 2)),
        (lambda x, y, g: ops.unpermute(y, inverse, weights)),
        (lambda x, y, g: ops.unpermute_bwd(g, y, order, inverse, weights)),
    ]
    for call in calls:
        for a, b in zip(call(x, y, grad), call(*map(misaligned, (x, y, grad))), strict=True):
            torch.testing.assert_close(a, b, rtol=2e-6, atol=1e-5)


def test_round_trip_is_exact(ops: Launchers) -> None:
    """unpermute(permute(x)) with weights 1/k, k a power of two."""
    order, inverse = _plan(33, 7, 4, "uniform")
    x = _normal(33, 40, dtype=torch.bfloat16)
    (rows,) = ops.permute(x, order, 4)
    (back,) = ops.unpermute(rows, inverse, torch.full((33, 4), 0.25))
    assert bits_equal(back, x)


def test_nan_in_an_unused_row_is_not_read(ops: Launchers) -> None:
    order, inverse = _plan(21, 4, 2, "dropped")
    y = _normal(42, 24)
    y[order < 0] = float("nan")
    weights = torch.where(inverse >= 0, 1.0, float("nan"))
    (out,) = ops.unpermute(y, inverse, weights)
    assert not out.isnan().any()
    _, grad_weights = ops.unpermute_bwd(_normal(21, 24), y, order, inverse, weights)
    assert not grad_weights.isnan().any()


def test_foreign_indices_are_dropped(ops: Launchers) -> None:
    """An index that is no slot or row counts as -1 instead of reading other memory."""
    order = torch.tensor([0, 4, 2**31 - 1, -5], dtype=torch.int32)
    x = _normal(2, 8)
    (y,) = ops.permute(x, order, 2)
    assert bits_equal(y, torch.cat([x[:1], torch.zeros(3, 8)]))
    (out,) = ops.unpermute(_normal(4, 8), order.view(2, 2), None)
    assert bits_equal(out, torch.cat([_normal(4, 8)[:1], torch.zeros(1, 8)]))


def test_empty(ops: Launchers) -> None:
    none = torch.zeros(0, dtype=torch.int32)
    assert ops.permute(torch.zeros(0, 8), none, 2)[0].shape == (0, 8)
    assert ops.unpermute(torch.zeros(0, 8), none.view(0, 2), None)[0].shape == (0, 8)
    order, inverse = _plan(3, 4, 2, "uniform")
    wide = ops.unpermute_bwd(torch.zeros(3, 0), torch.zeros(6, 0), order, inverse, torch.ones(3, 2))
    assert (wide[1] == 0).all()


def test_workspace_of_the_largest_plan(ops: Launchers) -> None:
    """Sizes are 64 bits wide; at most 528 blocks have M counters each, beside the M totals."""
    largest = ops.lib.workspace_bytes("dispatch_plan", ctypes.c_int64(2**31 - 1), 1024)
    assert largest == 529 * 1024 * 4
    assert ops.lib.workspace_bytes("dispatch_plan", ctypes.c_int64(0), 1024) == 2 * 1024 * 4
