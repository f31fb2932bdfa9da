# SPDX-License-Identifier: Apache-2.0
"""Optimizer and balance state of a resized pool."""

import copy

import pytest
import torch
from resized import make_trained, train_step
from small_models import make_ids

from unipool.models.resize import resize_pool

pytest.importorskip("transformers")
pytestmark = pytest.mark.usefixtures("device")


def adamw_step(parameter, state, group):
    """What AdamW makes of a parameter, from its gradient and its state before the step."""
    (b1, b2), lr, step = group["betas"], group["lr"], state["step"].item() + 1
    m = b1 * state["exp_avg"] + (1 - b1) * parameter.grad
    v = b2 * state["exp_avg_sq"] + (1 - b2) * parameter.grad**2
    update = (m / (1 - b1**step)) / ((v / (1 - b2**step)).sqrt() + group["eps"])
    return parameter.detach() * (1 - lr * group["weight_decay"]) - lr * update


@pytest.mark.parametrize(
    ("size", "arguments"),
    [
        (9, {"experts": [0, 3, 3]}),
        (9, {"experts": [0, 3, 3], "show": "all"}),
        (4, {"experts": [1, 4]}),
        (8, {"add": "init"}),
    ],
)
def test_the_step_after_resizing_is_adamw_with_the_carried_moments(size, arguments):
    model, optimizer = make_trained()
    pool = model.model.pools[0]
    old = {
        name: {key: value.clone() for key, value in optimizer.state[getattr(pool, name)].items()}
        for name in ("gate_up_proj", "down_proj")
    }
    (origin,) = resize_pool(model, size, optimizer=optimizer, **arguments)
    names = {id(parameter) for parameter in model.parameters()}
    assert {id(p) for group in optimizer.param_groups for p in group["params"]} == names
    assert {id(parameter) for parameter in optimizer.state} == names
    for name, state in old.items():
        carried = optimizer.state[getattr(pool, name)]
        assert carried["step"] == state["step"] == 2
        for new, source in enumerate(origin):
            due = torch.zeros_like(state["exp_avg"][0])
            for key in ("exp_avg", "exp_avg_sq"):
                expected = due if source < 0 else state[key][source]
                assert torch.equal(carried[key][new], expected)
    ids = make_ids(seed=6)
    optimizer.zero_grad()
    model.train()(ids, labels=ids).loss.backward()
    group = optimizer.param_groups[0]
    parameters = [p for p in model.parameters() if p.grad is not None]
    due = [adamw_step(p, optimizer.state[p], group) for p in parameters]
    optimizer.step()
    for parameter, expected in zip(parameters, due, strict=True):
        torch.testing.assert_close(parameter.detach(), expected, rtol=1e-5, atol=1e-7)


def test_momentum_of_other_optimizers_goes_along():
    model, _ = make_trained()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    train_step(model, optimizer, 0)
    momentum = optimizer.state[model.model.pools[0].down_proj]["momentum_buffer"].clone()
    resize_pool(model, 7, experts=[2], optimizer=optimizer)
    carried = optimizer.state[model.model.pools[0].down_proj]["momentum_buffer"]
    assert torch.equal(carried, momentum[[0, 1, 2, 3, 4, 5, 2]])
    train_step(model, optimizer, 1)


@pytest.mark.any_device
def test_frozen_parameters_stay_frozen():
    model, _ = make_trained()
    model.model.pools[0].requires_grad_(False)
    resize_pool(model, 8)
    assert not model.model.pools[0].down_proj.requires_grad
    assert model.model.layers[0].router.weight.requires_grad


def test_balance_state_follows_the_layers_exactly():
    model, _ = make_trained(balance="layer")
    before = [balancer.fraction.clone() for balancer in model.model.balancers]
    resize_pool(model, 9)
    for layer, (balancer, old) in enumerate(zip(model.model.balancers, before, strict=True)):
        view = model.config.visible_experts(layer)
        assert balancer.num_experts == 9
        assert torch.equal(balancer.fraction[view], old)
        hidden = [expert for expert in range(9) if expert not in view]
        assert not balancer.fraction[hidden].any()
    hidden, _ = make_trained()
    ids = make_ids()
    loss = copy.deepcopy(hidden).train()(ids, labels=ids).aux_loss
    resize_pool(hidden, 9, show="hidden")
    grown = hidden.train()(ids, labels=ids).aux_loss
    torch.testing.assert_close(grown, loss * 9 / 6)  # coefficient * M


def test_balance_state_of_a_pool_is_split_and_keeps_its_sum():
    model, _ = make_trained()
    before = model.model.balancers[0].fraction.clone()
    resize_pool(model, 7, experts=[2])
    after = model.model.balancers[0].fraction
    torch.testing.assert_close(after[[0, 1, 3, 4, 5]], before[[0, 1, 3, 4, 5]])
    torch.testing.assert_close(after[[2, 6]], (before[2] / 2).expand(2))
    resize_pool(model, 4, experts=[0, 1, 2])
    torch.testing.assert_close(model.model.balancers[0].fraction.sum(), before.sum())
