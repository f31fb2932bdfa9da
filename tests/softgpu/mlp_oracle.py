# SPDX-License-Identifier: Apache-2.0
"""Cases of the four products of the expert MLP, their float64 results and the bounds of kernels.

Bounds hold for every element. A sum of n products in float32, in any order, is off by at most
n * eps(float32) * sum |a| |b| (twice what correct rounding gives: tensor cores may truncate), and
what is stored by half an eps(dtype) more. The functions of a sum (SwiGLU, its gradient) pass its
error on by their derivative and add ELEMENTWISE steps of their own.
"""

from dataclasses import dataclass, replace

import oracle
import torch
from kernel_library import bits_equal, under_schedules
from mlp_launchers import Layer, MlpLaunchers
from torch import Tensor

EPS = torch.finfo(torch.float32).eps
ELEMENTWISE = 16
NAN = float("nan")


@dataclass(frozen=True)
class Case:
    """Tokens, experts, slots per token, widths, and how ids are drawn."""

    tokens: int
    experts: int
    top_k: int
    d_model: int
    d_ff: int
    routing: str

    def __str__(self) -> str:
        sizes = (self.tokens, self.experts, self.top_k, self.d_model, self.d_ff)
        return "T{}-M{}-k{}-D{}-F{}-".format(*sizes) + self.routing

    @property
    def generator(self) -> torch.Generator:
        return torch.Generator().manual_seed(self.tokens + self.d_model)

    def normal(self, *shape: int, std: float = 1.0, dtype: torch.dtype = torch.float32) -> Tensor:
        return (torch.randn(shape, generator=self.generator) * std).to(dtype)

    def plan(self) -> tuple[Tensor, Tensor, Tensor]:
        """order [N], inverse [T, k], offsets [M + 1]. The first and the last expert stay empty if
        there are more than two."""
        shape, g = (self.tokens, self.top_k), self.generator
        first = min(1, self.experts - 1)
        ids = torch.randint(first, max(self.experts - 1, first + 1), shape, generator=g)
        if self.routing == "skewed":  # one expert has more than a row of the largest tiles
            ids = torch.where(torch.rand(shape, generator=g) < 0.75, self.experts // 2, ids)
        if self.routing == "dropped":
            ids = torch.where(torch.rand(shape, generator=g) < 0.3, -1, ids)
        if self.routing == "none":
            ids = torch.full_like(ids, -1)
        order, inverse, offsets = oracle.dispatch_plan([ids.int()], self.experts)
        return order, inverse.view(shape), offsets

    def layer(self, dtype: torch.dtype) -> Layer:
        """Experts without rows hold NaN, and so do the weights of dropped slots."""
        M, D, F = self.experts, self.d_model, self.d_ff
        order, inverse, offsets = self.plan()
        idle = (offsets.diff() == 0).view(M, 1, 1)
        gate_up = self.normal(M, 2 * F, D, std=D**-0.5).masked_fill(idle, NAN)
        down = self.normal(M, D, F, std=F**-0.5).masked_fill(idle, NAN)
        weights = self.normal(*inverse.shape).masked_fill(inverse < 0, NAN)
        return Layer(gate_up.to(dtype), down.to(dtype), weights, order, inverse, offsets)

    def token_rows(self, layer: Layer, dtype: torch.dtype) -> Tensor:
        """[T, D]; NaN in the rows of tokens that were dropped"""
        rows = self.normal(self.tokens, self.d_model, dtype=dtype)
        return rows.masked_fill((layer.inverse < 0).all(1, keepdim=True), NAN)

    def sorted_rows(self, layer: Layer, width: int, dtype: torch.dtype) -> Tensor:
        """[N, width]; NaN past the last expert's row"""
        rows = self.normal(layer.order.numel(), width, dtype=dtype)
        rows[int(layer.offsets[-1]) :] = NAN
        return rows


def with_foreign_slots(layer: Layer) -> Layer:
    """Three rows of experts hold what is no slot, and their slots what is no row."""
    order, inverse = layer.order.clone(), layer.inverse.clone()
    for row, foreign in ((3, -7), (4, order.numel()), (20, 2**31 - 1)):
        inverse.view(-1)[int(order[row])] = foreign
        order[row] = foreign
    return replace(layer, order=order, inverse=inverse)


class Oracle:
    """Exact values and their bounds, of sorted rows; rows without a slot are zeros."""

    def __init__(self, layer: Layer) -> None:
        self.layer = layer
        rows, *_, experts, self.top_k = layer.sizes
        bounds = layer.offsets.tolist()
        self.spans = [slice(bounds[e], bounds[e + 1]) for e in range(experts)]
        order = layer.order.long()
        self.used = (order >= 0) & (order < rows)
        self.used[bounds[-1] :] = False
        self.slot = torch.where(self.used, order, 0)

    def gather(self, x: Tensor) -> Tensor:
        """[N, D] of [T, D]"""
        return self._kept(x.double()[self.slot // self.top_k])

    def weight(self) -> Tensor:
        """[N, 1]"""
        return self._kept(self.layer.weights.double().flatten()[self.slot].unsqueeze(1))

    def product(self, rows: Tensor, experts: Tensor) -> tuple[Tensor, Tensor]:
        """rows [N, K] times experts[e] [K, n]: values and bounds, [N, n]"""
        rows, experts = rows.double(), experts.double()
        out, size = (torch.zeros(rows.shape[0], experts.shape[2]).double() for _ in range(2))
        for span, expert in zip(self.spans, experts, strict=True):
            if span.start < span.stop:
                out[span] = rows[span] @ expert
                size[span] = rows[span].abs() @ expert.abs()
        return out, (rows.shape[1] + ELEMENTWISE) * EPS * size

    def to_tokens(self, rows: Tensor) -> Tensor:
        """Of top_k 1: [T, D], a token without a row gets zeros"""
        out = torch.zeros_like(rows)
        out[self.slot[self.used]] = rows[self.used]
        return out

    def _kept(self, rows: Tensor) -> Tensor:
        return torch.where(self.used.unsqueeze(1), rows, 0.0)


def activate(preact: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """silu(gate), its derivative and up, [N, F]"""
    gate, up = preact.double().chunk(2, 1)
    sigmoid = gate.sigmoid()
    return gate * sigmoid, sigmoid * (1 + gate * (1 - sigmoid)), up


def assert_within(got: Tensor, want: Tensor, bound: Tensor) -> None:
    info = torch.finfo(got.dtype)
    bound = bound + info.eps / 2 * (want.abs() + bound) + info.smallest_normal * info.eps
    excess = (got.double() - want).abs() - bound
    assert not got.isnan().any(), "NaN: unwritten, or read where nothing is to be read"
    assert (excess <= 0).all(), f"off by {excess.max():.3g} more than allowed"
    assert (got[(want == 0).all(1)] == 0).all(), "rows of zeros must be zeros"


def check_up(ops: MlpLaunchers, layer: Layer, x: Tensor, tile: int) -> None:
    exact = Oracle(layer)
    preact, hidden = under_schedules(lambda: ops.up(layer, x, tile=tile))
    assert_within(preact, *exact.product(exact.gather(x), layer.gate_up.mT))
    silu, _, up = activate(preact)  # hidden is that of the stored pre-activations
    assert_within(hidden, silu * up, ELEMENTWISE * EPS * (silu * up).abs())
    _, alone = ops.up(layer, x, keep=False, tile=tile)
    assert bits_equal(alone, hidden)


def check_down(ops: MlpLaunchers, layer: Layer, hidden: Tensor, tile: int) -> None:
    exact = Oracle(layer)
    (out,) = under_schedules(lambda: [ops.down(layer, hidden, tile=tile)])
    product, bound = exact.product(hidden, layer.down.mT)
    want, bound = exact.weight() * product, exact.weight().abs() * bound
    if exact.top_k == 1:
        want, bound = exact.to_tokens(want), exact.to_tokens(bound)
    assert_within(out, want, bound)


def check_hidden_bwd(
    ops: MlpLaunchers, layer: Layer, grad: Tensor, preact: Tensor, tile: int
) -> None:
    def run(in_place: bool) -> tuple[Tensor, Tensor, Tensor]:
        return ops.hidden_bwd(layer, grad, preact, in_place=in_place, tile=tile)

    exact = Oracle(layer)
    results = under_schedules(lambda: run(True))
    assert all(map(bits_equal, results, run(False)))
    grad_preact, hidden, grad_weights = results

    g, g_bound = exact.product(exact.gather(grad), layer.down)
    silu, silu_bwd, up = activate(torch.where(exact.used.unsqueeze(1), preact, 0.0))
    w, act = exact.weight(), silu * up
    by = torch.cat([w * up * silu_bwd, w * silu], 1)
    # silu' is a sum that may cancel: 1 + gate * (1 - sigmoid), of terms up to 1 + |gate|.
    gate = preact.double().chunk(2, 1)[0].nan_to_num()
    size = torch.cat([w * up * (1 + gate.abs()), w * silu], 1).abs()
    g_twice, steps = g.repeat(1, 2), ELEMENTWISE * EPS
    bound = by.abs() * g_bound.repeat(1, 2) + steps * size * g_twice.abs()
    assert_within(grad_preact, by * g_twice, bound)
    assert_within(hidden, w * act, steps * (w * act).abs())

    want, bound = (torch.zeros(layer.weights.numel(), 1).double() for _ in range(2))
    slots, length = exact.slot[exact.used], act.shape[1] + ELEMENTWISE
    error = act.abs() * g_bound + length * EPS * (g * act).abs()
    want[slots] = (g * act).sum(1, keepdim=True)[exact.used]
    bound[slots] = error.sum(1, keepdim=True)[exact.used]
    assert_within(grad_weights.view(-1, 1), want, bound)


def check_input_bwd(ops: MlpLaunchers, layer: Layer, grad_preact: Tensor, tile: int) -> None:
    exact = Oracle(layer)
    (out,) = under_schedules(lambda: [ops.input_bwd(layer, grad_preact, tile=tile)])
    want, bound = exact.product(grad_preact, layer.gate_up)
    if exact.top_k == 1:
        want, bound = exact.to_tokens(want), exact.to_tokens(bound)
    assert_within(out, want, bound)


def check_all(ops: MlpLaunchers, case: Case, layer: Layer, dtype: torch.dtype, tile: int) -> None:
    check_up(ops, layer, case.token_rows(layer, dtype), tile)
    check_down(ops, layer, case.sorted_rows(layer, case.d_ff, dtype), tile)
    preact = case.sorted_rows(layer, 2 * case.d_ff, dtype)
    check_hidden_bwd(ops, layer, case.token_rows(layer, dtype), preact, tile)
    check_input_bwd(ops, layer, preact, tile)
