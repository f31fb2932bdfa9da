# SPDX-License-Identifier: Apache-2.0
"""Faults planted in the project's kernels, one at a time: the tests beside must be able to fail.

A fault is an edit of a source's text. It is compiled for the check flavour and for float32 only,
and counts as found if a launch fails with a report or any schedule gives a wrong result.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass

import oracle
import pytest
import torch
from emulib import SCHEDULES, LaunchError, Lib, launchers_library, with_headers
from launchers import Launchers
from torch import Tensor

ROUTER, DISPATCH = "cuda/router.cu", "cuda/dispatch.cu"
OWN_HEADER = re.compile(r'#include "(cuda/device/(?:row|scores|warp)\.cuh)"\n')
Check = Callable[[Launchers], bool]


@dataclass(frozen=True)
class Fault:
    """`old` becomes `new` in `source` (or in a header that it includes); `check` must see it."""

    name: str
    source: str
    old: str
    new: str
    check: str

    def __str__(self) -> str:
        return self.name


BARRIER = "__syncthreads();"
BLOCK_SUM = f"{BARRIER}\n  for (int e = threadIdx.x; e < experts; e += kThreads) {{\n    float sum"
FAULTS = [
    Fault("tie_to_higher_id", ROUTER, "key[i] > best", "key[i] >= best && key[i] != 0", "router"),
    Fault("tie_across_lanes", ROUTER, "other_id < id", "other_id > id", "router"),
    Fault("chosen_twice", ROUTER, "== id) key[i] = 0;", "== id) key[i] += 0;", "router"),
    Fault("no_token_predicate", ROUTER, "token < a.tokens ? open : 0", "open", "router"),
    Fault("unguarded_store", ROUTER, "j < a.top_k && token < a.tokens", "j < a.top_k", "router"),
    Fault("load_not_cleared", ROUTER, "load[e] = 0;", ";", "router"),
    Fault("plain_count", ROUTER, "atomicAdd(&load[ids.v[i]], 1)", "load[ids.v[i]] += 1", "router"),
    Fault("mask_in_the_norm", ROUTER, "z[i] = is_open(open, i) ? z[i] : 0.f;", ";", "router"),
    Fault("no_barrier_in_block_sum", ROUTER, BLOCK_SUM, BLOCK_SUM[len(BARRIER) :], "router"),
    Fault("gradient_of_one_slot", ROUTER, "ids.get(j)", "ids.get(0)", "router_bwd"),
    Fault("norm_gradient_dropped", ROUTER, "- z[i] * inner", "", "router_bwd"),
    Fault("counts_not_cleared", DISPATCH, "count[e] = 0;", ";", "plan"),
    Fault(
        "no_syncwarp_counting", DISPATCH, "    __syncwarp();  // another", "    // another", "plan"
    ),
    Fault("no_syncwarp_placing", DISPATCH, "peers.rank;\n    __syncwarp();", "peers.rank;", "plan"),
    Fault("unstable", DISPATCH, "same & ((1u << lane) - 1)", "same & ~((2u << lane) - 1)", "plan"),
    Fault("no_tail", DISPATCH, "out.order[row] = -1", "out.order[row] = out.order[row]", "plan"),
    Fault("past_the_last_row", DISPATCH, "if (row >= rows) return;", "", "permute"),
    Fault("past_the_last_token", DISPATCH, "if (token >= args.tokens) return;", "", "unpermute"),
    Fault("dropped_slot_read", DISPATCH, "used = unsigned(row) < rows", "used = true", "unpermute"),
    Fault(
        "stale_row",
        DISPATCH,
        "V::zero().store(grad_y",
        "if (vecs < 0) V::zero().store(grad_y",
        "unpermute",
    ),
    Fault("lost_lane", DISPATCH, "dot = group_sum(dot);", "", "unpermute"),
]


# --- what is run; each returns whether all is right


def _normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _router(ops: Launchers) -> bool:
    """M = 96 (8 lanes a row) and 160 (32 lanes), ties, a mask, a last block that is not full."""
    right = True
    for experts, top_k in ((96, 8), (160, 2)):
        z = (_normal(37, experts) * 4).round() / 4
        mask = torch.arange(experts) % 7 == 3
        weights, ids, load, importance = ops.norm_topk(z, torch.ones(1), top_k, mask=mask)
        s = oracle.norm_scores(z.double(), torch.tensor(1.0), 1.0, 1e-8, mask)
        chosen = oracle.choose(s.float().double(), top_k, None, mask)
        right &= torch.equal(ids, chosen) and torch.equal(load, oracle.load_of(chosen, experts))
        right &= torch.allclose(weights.double(), oracle.weights_of(s, chosen), atol=1e-5)
        right &= torch.allclose(importance.double(), s.sum(0), atol=1e-4)
    return right


def _router_bwd(ops: Launchers) -> bool:
    z = _normal(37, 96).double().requires_grad_()
    s = oracle.norm_scores(z, torch.tensor(1.0), 1.0, 1e-8, None)
    ids = oracle.choose(s.float().double(), 4, None, None)
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


# --- edits


def _flatten(source: str) -> str:
    """A source with its own device headers in place, for float32 only: what an edit is made in."""
    text = with_headers(source, OWN_HEADER)
    return re.sub(r"    case DType::k(Float16|BFloat16):\n      return [^;]*;\n", "", text)


def _library(fault: Fault) -> Launchers:
    text = _flatten(fault.source)
    assert fault.old in text, f"{fault.name}: the source no longer holds {fault.old!r}"
    mutant = {fault.source: text.replace(fault.old, fault.new)}
    return Launchers(Lib(launchers_library("check", mutant)))


def _found(ops: Launchers, check: Check) -> bool:
    for schedule in SCHEDULES:
        ops.lib.schedule(*schedule)
        try:
            if not check(ops):
                return True
        except LaunchError:
            return True
    return False


@pytest.mark.parametrize("check", CHECKS)
def test_no_fault_is_found_in_the_kernels_as_they_are(check: str) -> None:
    ops = Launchers(Lib(launchers_library("check")))
    assert not _found(ops, CHECKS[check])


@pytest.mark.parametrize("fault", FAULTS, ids=str)
def test_fault_is_found(fault: Fault) -> None:
    assert _found(_library(fault), CHECKS[fault.check])
