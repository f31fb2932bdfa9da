# SPDX-License-Identifier: Apache-2.0
"""Micro-batches without a target or without a token, and forwards that train nothing: no loss, no
gradient that is not finite, and no state that moves."""

import copy

import pytest
import torch
from small_models import make_ids, make_model

pytestmark = pytest.mark.usefixtures("device")


def labels_of(ids: torch.Tensor, targets: int) -> torch.Tensor:
    """The last `targets` positions have one."""
    labels = torch.full_like(ids, -100)
    if targets:
        labels[:, -targets:] = ids[:, -targets:]
    return labels


@pytest.mark.parametrize("delay", [0, 1])
@pytest.mark.parametrize("items", ["none", "int", "tensor"])
def test_a_step_without_targets_is_zero(delay, items):
    model = make_model(balance_delay=delay).train()
    ids = make_ids(2, 8)
    model(ids, labels=ids).loss.backward()
    model.zero_grad()
    given = {"none": {}, "int": {"num_items_in_batch": 0}}
    given["tensor"] = {"num_items_in_batch": torch.tensor(0, device=ids.device)}
    output = model(ids, labels=labels_of(ids, 0), **given[items])
    assert output.lm_loss.item() == 0.0
    assert output.aux_loss.isfinite()
    assert output.aux_loss.item() == 0.0 or items == "none"
    output.loss.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
    head = model.lm_head.weight.grad
    assert head.eq(0).all()


def test_micro_batches_of_unequal_targets_add_up_to_the_step():
    """One of them has none at all."""
    model = make_model(balance_delay=0).train()
    ids = [make_ids(1, 8, seed=seed) for seed in range(3)]
    labels = [labels_of(i, n) for i, n in zip(ids, (5, 0, 2), strict=True)]
    outputs = [
        model(i, labels=lab, num_items_in_batch=7) for i, lab in zip(ids, labels, strict=True)
    ]
    whole = model(torch.cat(ids), labels=torch.cat(labels))
    torch.testing.assert_close(sum(o.lm_loss for o in outputs), whole.lm_loss)
    alone = [model(i).aux_loss for i in ids]
    torch.testing.assert_close(
        sum(o.aux_loss for o in outputs), 5 / 7 * alone[0] + 2 / 7 * alone[2]
    )


def test_the_mean_over_targets_is_that_of_the_library():
    model = make_model().train()
    ids = make_ids(2, 8)
    labels = labels_of(ids, 3)
    output = model(ids, labels=labels)
    due = torch.nn.functional.cross_entropy(
        output.logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten()
    )
    assert torch.equal(output.lm_loss, due)


@pytest.mark.parametrize("router", ["norm", "softmax"])
def test_state_moves_in_training_steps_only(router):
    model = make_model(router=router).train()
    a, b = make_ids(2, 8), make_ids(2, 8, seed=2)
    model(a, labels=a).loss.backward()
    state = [balancer.fraction.clone() for balancer in model.model.balancers]
    assert all(fraction.sum() > 0 for fraction in state)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin(b, labels=b)
    with torch.inference_mode():
        twin(b)
    twin.generate(b, max_new_tokens=3, do_sample=False, pad_token_id=0)
    twin.eval()(b, labels=b)
    twin.train()
    assert all(torch.equal(x, y.fraction) for x, y in zip(state, twin.model.balancers, strict=True))
    assert torch.equal(twin(b, labels=b).aux_loss, model(b, labels=b).aux_loss)
    assert not torch.equal(state[0], model.model.balancers[0].fraction)


def test_a_micro_batch_of_padding_moves_no_state():
    model = make_model(balance_delay=1).train()
    ids = make_ids(2, 8)
    model(ids, labels=ids)
    before = model.model.balancers[0].fraction.clone()
    output = model(ids, attention_mask=torch.zeros_like(ids), labels=labels_of(ids, 0))
    assert all(len(routing.experts) == 0 for routing in output.routings)
    assert torch.equal(model.model.balancers[0].fraction, before)
    output.loss.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
