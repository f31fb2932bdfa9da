# SPDX-License-Identifier: Apache-2.0
"""unipool.ops.costs against what calls are seen to compute, take and give."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from workloads import CI, Workload, draw_ids

from unipool import ops, reference
from unipool.ops import costs

RAW = torch.ops.unipool
pytestmark = pytest.mark.usefixtures("one_thread")


def nbytes(*tensors: Tensor) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def moved(op: Callable, *arguments: object) -> int:
    """Bytes of all tensors that a call takes and gives, each once."""
    results = op(*arguments)
    given = [
        a
        for argument in arguments
        for a in (argument if isinstance(argument, list) else [argument])
    ]
    taken = [results] if isinstance(results, Tensor) else list(results)
    return nbytes(*(t for t in [*given, *taken] if isinstance(t, Tensor)))


def flops(call: Callable[[], object]) -> int:
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


class Problem:
    """A layer of a workload in which every expert has rows, in bfloat16."""

    def __init__(self, w: Workload) -> None:
        generator = torch.Generator().manual_seed(0)
        self.w, self.ids = w, draw_ids(w, "uniform", generator)
        self.ids[:, 0] = torch.arange(w.tokens) % w.experts  # every expert has rows
        for j in range(1, w.top_k):
            self.ids[:, j] = (self.ids[:, 0] + j) % w.experts
        self.plan = RAW.dispatch_plan([self.ids], w.experts)
        options = {"dtype": torch.bfloat16}
        self.x = torch.randn(w.tokens, w.d_model, **options)
        self.rows = torch.randn(w.rows, w.d_model, **options)
        self.weights = torch.rand(w.tokens, w.top_k)
        self.gate_up = torch.randn(w.experts, 2 * w.d_ff, w.d_model, **options)
        self.down = torch.randn(w.experts, w.d_model, w.d_ff, **options)
        self.used = int((self.plan[2].diff() > 0).sum())


WIDE = [w for w in CI if w.tokens >= w.experts]


@pytest.fixture(params=WIDE, ids=lambda w: w.name)
def p(request) -> Problem:
    return Problem(request.param)


def test_every_expert_of_the_problems_has_rows(p):
    assert p.used == p.w.experts


def test_router_logits(p):
    w = p.w
    weight = torch.randn(w.experts, w.d_model, dtype=torch.bfloat16)
    cost = costs.router_logits(w.tokens, w.d_model, w.experts, 2)
    assert cost.bytes == moved(RAW.router_logits, p.x, weight)
    assert cost.flops == flops(lambda: reference.router_logits(p.x, weight))
    grad = torch.randn(w.tokens, w.experts)
    cost = costs.router_logits_bwd(w.tokens, w.d_model, w.experts, 2)
    assert cost.bytes == moved(RAW.router_logits_bwd, grad, p.x, weight)
    assert cost.flops == flops(lambda: (grad @ weight.float(), grad.T @ p.x.float()))


def test_routers(p):
    w = p.w
    logits, scale = torch.randn(w.tokens, w.experts), torch.ones(1)
    forward = moved(RAW.norm_topk, logits, scale, w.top_k, 1.0, 1e-8, None, None)
    assert costs.topk(w.tokens, w.experts, w.top_k) == costs.Cost(0, forward - nbytes(scale))
    grads = torch.randn(w.tokens, w.top_k), torch.randn(w.experts)
    backward = moved(RAW.softmax_topk_bwd, *grads, logits, p.ids, False, None)
    assert costs.topk_bwd(w.tokens, w.experts, w.top_k).bytes == backward


def test_dispatch(p):
    w, (order, inverse, offsets) = p.w, p.plan
    sizes = (w.tokens, w.top_k, w.d_model, 2)
    plan = costs.dispatch_plan(w.rows, w.experts)
    assert plan.bytes == nbytes(p.ids, order, inverse, offsets)
    assert costs.permute(*sizes).bytes == moved(RAW.permute, p.x, order, w.top_k)
    assert costs.unpermute(*sizes).bytes == moved(RAW.unpermute, p.rows, inverse, p.weights)
    backward = moved(RAW.unpermute_bwd, p.x, p.rows, order, inverse, p.weights)
    assert costs.unpermute_bwd(*sizes).bytes == backward


def test_grouped_mm(p):
    w, offsets = p.w, p.plan[2]
    n, k = p.gate_up.shape[1:]
    cost = costs.grouped_mm(w.rows, n, k, p.used, 2)
    assert cost.bytes == moved(RAW.grouped_mm, p.rows, p.gate_up, offsets) - nbytes(offsets)
    assert cost.flops == flops(lambda: reference.grouped_mm(p.rows, p.gate_up, offsets))
    grad = torch.randn(w.rows, n, dtype=torch.bfloat16)
    back = moved(RAW.grouped_mm_bwd_a, grad, p.gate_up, offsets) - nbytes(offsets)
    assert cost.bytes == back


def test_weight_gradients(p):
    """Those of the layers of a pass, whose plans count for nothing."""
    w, (order, _, offsets) = p.w, p.plan
    layers = w.layers
    preact = torch.randn(w.rows, 2 * w.d_ff, dtype=torch.bfloat16)
    hidden = torch.randn(w.rows, w.d_ff, dtype=torch.bfloat16)
    plans = layers * nbytes(order, offsets)
    repeated = [[t] * layers for t in (preact, p.x, order, offsets, hidden)]
    preacts, xs, orders, offset_lists, hiddens = repeated
    up = moved(RAW.grouped_wgrad, preacts, xs, orders, offset_lists, 0, w.top_k) - plans
    down = moved(RAW.grouped_wgrad, xs, hiddens, orders, offset_lists, w.top_k, 0) - plans
    cost = costs.expert_wgrad(w.tokens, w.top_k, w.d_model, w.d_ff, w.experts, 2, layers)
    assert cost.bytes == up + down
    assert cost.flops == 6.0 * layers * w.rows * w.d_model * w.d_ff
    into = costs.expert_wgrad(w.tokens, w.top_k, w.d_model, w.d_ff, w.experts, 2, layers, out=8)
    assert into.bytes - cost.bytes == 6 * nbytes(p.gate_up, p.down) / 2


def test_expert_mlp(p):
    """Arguments and results, and what goes from product to product: once out and once in."""
    w = p.w
    pool = (p.weights, p.gate_up, p.down, *p.plan)
    beside = nbytes(p.weights, *p.plan)
    sizes = (w.tokens, w.top_k, w.d_model, w.d_ff, p.used, 2)
    hidden = 2 * w.rows * w.d_ff
    summed = 2 * 2 * w.rows * w.d_model if w.top_k > 1 else 0
    forward = moved(RAW.expert_mlp, p.x, *pool, True) - beside
    assert costs.expert_mlp(*sizes).bytes == forward + 2 * hidden + summed
    without = moved(RAW.expert_mlp, p.x, *pool, False) - beside
    assert costs.expert_mlp(*sizes, keep=False).bytes == without + 2 * hidden + summed
    routing = ops.Routing(p.weights, p.ids, None, None)
    counted = flops(lambda: reference.expert_mlp(p.x, routing, p.gate_up, p.down))
    assert costs.expert_mlp(*sizes).flops == counted

    _, preact = RAW.expert_mlp(p.x, *pool, True)
    grad_weights = nbytes(p.weights)
    backward = moved(RAW.expert_mlp_bwd, p.x, *pool, preact) - beside - grad_weights
    grad_preact_again = nbytes(preact)
    cost = costs.expert_mlp_bwd(*sizes)
    assert cost.bytes == backward + grad_preact_again + summed
    assert cost.flops == counted


def test_costs_add_up_and_the_greater_time_is_the_floor():
    cost = 2 * costs.Cost(3.0, 10.0) + costs.Cost(4.0, 0.0)
    assert cost == costs.Cost(10.0, 20.0)
    assert cost.seconds(1.0, 10.0) == 10.0
    assert cost.seconds(10.0, 1.0) == 20.0
    assert cost.bound(1.0, 10.0) == "flops"
    assert cost.bound(10.0, 1.0) == "bytes"
