# SPDX-License-Identifier: Apache-2.0
"""Second derivatives are refused, in one line, on every route and for every tensor; the reference
has them."""

import pytest
import torch
from cases import BY_NAME
from specs import SPECS, to_device, upstream
from torch.autograd.functional import hessian, hvp, jvp

from unipool import ops, reference
from unipool.nn import ExpertPool, SoftmaxRouter, pooled_moe

REFUSED = r"first derivatives only: its backward cannot be differentiated"
DIFFERENTIABLE = [spec for spec in SPECS if spec.differentiable]


def loss_of(spec, case, inputs, lib) -> torch.Tensor:
    results = spec.call(lib, inputs)
    roots = [(n, t) for n, t in results.items() if t.is_floating_point() and t.requires_grad]
    return sum((t.double().square() * upstream(case, n, t)).sum() for n, t in roots)


def by_grad(total, leaf):
    torch.autograd.grad(total, leaf, retain_graph=True)


def by_backward(total, _):
    total.backward(retain_graph=True)


@pytest.mark.parametrize("way", [by_grad, by_backward])
@pytest.mark.parametrize("spec", DIFFERENTIABLE, ids=str)
def test_every_op_refuses(spec, way, device):
    case = BY_NAME["dropped"]
    inputs = to_device(spec.inputs(case, torch.float32), device)
    leaves = [inputs[name].requires_grad_() for name in spec.differentiable]
    for first in leaves:
        (grad,) = torch.autograd.grad(loss_of(spec, case, inputs, ops), first, create_graph=True)
        if not grad.requires_grad:
            continue
        for second in leaves:
            with pytest.raises(RuntimeError, match=REFUSED) as caught:
                way(grad.sum(), second)
            assert "\n" not in str(caught.value).strip()


def problem(device):
    torch.manual_seed(0)
    sizes = ((4, 20, 8), (4, 8, 10), (4, 8), (6, 8), (6, 8))
    return (torch.randn(*s, dtype=torch.float64, device=device) for s in sizes)


@pytest.mark.parametrize("route", [hvp, hessian, jvp])
def test_functions_of_second_derivatives_refuse(route):
    gate_up, down, weight, x, v = problem("cpu")

    def loss(lib):
        def of(x):
            routing = lib.softmax_topk(lib.router_logits(x, weight), 2)
            return (x + lib.expert_mlp(x, routing, gate_up, down)).square().sum()

        return of

    arguments = (x,) if route is hessian else (x, v)
    route(loss(reference), *arguments)
    with pytest.raises(RuntimeError, match=REFUSED):
        route(loss(ops), *arguments)


@pytest.mark.parametrize("mode", ["deferred", "accumulate", "autograd"])
@pytest.mark.parametrize("first", ["x", "gate_up_proj", "down_proj", "router"])
def test_a_pool_pass_refuses_for_every_pair(mode, first, device):
    torch.manual_seed(0)
    pool = ExpertPool(4, 8, 10, weight_grad=mode, device=device)
    routers = [SoftmaxRouter(8, 4, 2, device=device) for _ in range(2)]
    x = torch.randn(6, 8, device=device, requires_grad=True)
    experts = pool.begin_pass()
    y = x
    for router in routers:
        y = y + pooled_moe(y, router, experts)[0]
    leaves = {"x": x, "router": routers[0].weight, **dict(pool.named_parameters())}
    (grad,) = torch.autograd.grad(y.square().sum(), leaves[first], create_graph=True)
    for second in leaves.values():
        with pytest.raises(RuntimeError, match=REFUSED):
            torch.autograd.grad(grad.square().sum(), second, retain_graph=True)


def test_first_derivatives_under_create_graph_are_those_without(device):
    case = BY_NAME["ragged"]
    spec = next(s for s in SPECS if s.name == "expert_mlp")
    inputs = to_device(spec.inputs(case, torch.float32), device)
    leaves = [inputs[name].requires_grad_() for name in spec.differentiable]
    plain, kept = (
        torch.autograd.grad(loss_of(spec, case, inputs, ops), leaves, create_graph=create)
        for create in (False, True)
    )
    for a, b in zip(plain, kept, strict=True):
        assert torch.equal(a, b)
        assert b.requires_grad
