# SPDX-License-Identifier: Apache-2.0
"""Faults planted in the kernels of routers and dispatch: the tests beside must be able to fail. A
fault counts as found if a launch fails with a report or any schedule gives a wrong result."""

from collections.abc import Callable
from functools import partial

import oracle
import pytest
import torch
from launchers import Launchers
from source_faults import NONE, Fault, Planted, is_found, only_dtype
from torch import Tensor

ROUTER, DISPATCH = "cuda/router.cu", "cuda/dispatch.cu"
ROW, SCORES = "cuda/device/row.cuh", "cuda/device/scores.cuh"
Check = Callable[[Launchers], bool]


FAULTS = [
    Fault("tie_to_higher_id", "router", ROW, "«key[i] > best»", "key[i] >= best && key[i] != 0"),
    Fault("tie_across_lanes", "router", ROW, "«other_id < id»", "other_id > id"),
    Fault("chosen_twice", "router", ROW, "== id) «key[i] = 0;»", ";"),
    Fault(
        "no_token_predicate",
        "router",
        ROUTER,
        "«walk.active() ? open : 0»;\n    const auto row = score.template scores",
        "open",
    ),
    Fault("unguarded_store", "router", ROUTER, "«j >= a.top_k || !walk.active()»", "j >= a.top_k"),
    Fault("load_not_cleared", "router", ROUTER, "«load[e] = 0;»", ";"),
    Fault(
        *("plain_count", "router", ROUTER),
        *("«atomicAdd(&load[ids.v[i]], 1);»", "load[ids.v[i]] += 1;"),
    ),
    Fault("silent_slot_kept", "router", ROUTER, "«choice.ids.v[i] = -1;»", ";"),
    Fault(
        *("mask_in_the_norm", "router", SCORES),
        *("«z[i] = is_open(open, i) ? z[i] : 0.f;»", ";"),
    ),
    Fault(
        *("no_barrier_in_block_sum", "router", ROUTER),
        *("scratch[warp * experts + e] = sums[i];\n  }\n  «__syncthreads();»", ";"),
    ),
    Fault("gradient_of_one_slot", "router_bwd", ROUTER, "«ids.get(j)»", "ids.get(0)"),
    Fault("norm_gradient_dropped", "router_bwd", SCORES, "relu - «z[i] * inner»", "0.f"),
    Fault("counts_not_cleared", "plan", DISPATCH, "«count[e] = 0;»", ";"),
    Fault("no_syncwarp", "plan", DISPATCH, "«__syncwarp();»", ";"),
    Fault("unstable", "plan", DISPATCH, "same & «((1u << lane) - 1)»", "~((2u << lane) - 1)"),
    Fault("no_tail", "plan", DISPATCH, "«out.order[row] = -1;»", ";"),
    Fault("past_the_last_row", "permute", DISPATCH, "«if (row >= rows) return;»", ";"),
    Fault("past_the_last_token", "unpermute", DISPATCH, "«if (token >= args.tokens) return;»", ";"),
    Fault("dropped_slot_read", "unpermute", DISPATCH, "used = «unsigned(row) < rows»", "true"),
    Fault(
        *("stale_row", "unpermute", DISPATCH),
        *("«V::zero().store(grad_y + slot * args.width + at * kVec);»", ";"),
    ),
    Fault("lost_lane", "unpermute", DISPATCH, "«dot = group_sum(dot);»", ";"),
]


# --- what is run; each returns whether all is right


def _normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _router(ops: Launchers) -> bool:
    """M = 96 (8 lanes per row) and 160 (32 lanes), ties, silence, a mask, a last block not full."""
    right = True
    for experts, top_k in ((96, 8), (160, 2)):
        z = (_normal(37, experts) * 4).round() / 4
        z[::5] = -z[::5].abs()  # silent
        mask = torch.arange(experts) % 7 == 3
        weights, ids, load, importance = ops.norm_topk(z, torch.ones(1), top_k, mask=mask)
        s = oracle.norm_scores(z.double(), torch.tensor(1.0), 1.0, 1e-8, mask)
        chosen = oracle.choose(s.float().double(), top_k, None, mask, silent=True)
        right &= torch.equal(ids, chosen) and torch.equal(load, oracle.load_of(chosen, experts))
        right &= torch.allclose(weights.double(), oracle.weights_of(s, chosen), atol=1e-5)
        right &= torch.allclose(importance.double(), s.sum(0), atol=1e-4)
        p = oracle.softmax_scores(z.double(), None)
        right &= torch.allclose(ops.softmax_topk(z, top_k)[3].double(), p.sum(0), atol=1e-4)
    return right


def _router_bwd(ops: Launchers) -> bool:
    z = _normal(37, 96).double().requires_grad_()
    s = oracle.norm_scores(z, torch.tensor(1.0), 1.0, 1e-8, None)
    ids = oracle.choose(s.float().double(), 4, None, None, silent=True)
    gw, gi = _normal(37, 4, seed=1), _normal(96, seed=2)
    loss = (oracle.weights_of(s, ids) * gw).sum() + (s.sum(0) * gi).sum()
    (want,) = torch.autograd.grad(loss, z)
    got, _ = ops.norm_topk_bwd(gw, gi, z.detach().float(), torch.ones(1), ids)
    return torch.allclose(got.double(), want, atol=1e-5)


def _plan(ops: Launchers) -> bool:
    ids = torch.randint(-1, 6, (700, 2), generator=torch.Generator().manual_seed(0)).int()
    want = oracle.dispatch_plan([ids], 5)
    return all(torch.equal(a, b) for a, b in zip(ops.dispatch_plan([ids], 5), want, strict=True))


def _slots() -> tuple[Tensor, Tensor]:
    ids = torch.randint(-1, 4, (19, 2), generator=torch.Generator().manual_seed(0)).int()
    order, inverse, _ = oracle.dispatch_plan([ids], 4)
    return order, inverse.view(19, 2)


def _permute(ops: Launchers) -> bool:
    order, _ = _slots()
    x = _normal(19, 24)
    want = torch.where((order >= 0).unsqueeze(1), x[order.clamp(min=0).long() // 2], 0)
    return torch.equal(ops.permute(x, order, 2)[0], want)


def _unpermute(ops: Launchers) -> bool:
    order, inverse = _slots()
    y, weights, grad = _normal(38, 24), _normal(19, 2, seed=1), _normal(19, 24, seed=2)
    y64, w64 = y.double().requires_grad_(), weights.double().requires_grad_()
    out = oracle.unpermute(y64, inverse, w64)
    want = [out.detach(), *torch.autograd.grad(out, [y64, w64], grad.double())]
    got = [
        *ops.unpermute(y, inverse, weights),
        *ops.unpermute_bwd(grad, y, order, inverse, weights),
    ]
    return all(torch.allclose(a.double(), b, atol=1e-5) for a, b in zip(got, want, strict=True))


CHECKS: dict[str, Check] = {
    "router": _router,
    "router_bwd": _router_bwd,
    "plan": _plan,
    "permute": _permute,
    "unpermute": _unpermute,
}


# --- the kernels with their faults, for float32 only

PLANTED = {
    source: Planted(
        source,
        [f for f in FAULTS if (f.file == DISPATCH) == (source == DISPATCH)],
        partial(only_dtype, "Float32"),
    )
    for source in (ROUTER, DISPATCH)
}


def planted_for(check: str) -> Planted:
    return PLANTED[ROUTER if check.startswith("router") else DISPATCH]


@pytest.mark.parametrize("check", CHECKS)
def test_no_fault_is_found_in_the_kernels_as_they_are(ops: Launchers, check: str) -> None:
    with planted_for(check).fault(NONE):
        assert not is_found(lambda: CHECKS[check](ops))


@pytest.mark.parametrize("fault", FAULTS, ids=str)
def test_fault_is_found(ops: Launchers, fault: Fault) -> None:
    planted = planted_for(fault.check)
    with planted.fault(planted.number(fault)):
        assert is_found(lambda: CHECKS[fault.check](ops))
