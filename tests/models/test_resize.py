# SPDX-License-Identifier: Apache-2.0
"""Pools that grow and shrink: outputs, what layers see, refusals."""

import copy

import devices
import pytest
import torch
from resized import make_trained, train_step
from small_models import make_ids, make_model

from unipool.models import UniPoolForCausalLM
from unipool.models.resize import expert_mask, measure_load, resize_pool, set_layer_experts
from unipool.nn.router import norm_router_calibration

pytest.importorskip("transformers")
pytestmark = pytest.mark.usefixtures("device")


FORMS = {
    "norm": {},
    "norm-top1": {"num_experts_per_tok": 1},
    "softmax": {"router": "softmax", "norm_topk_prob": True},
    "by-layer": {"balance": "layer"},
    "two-pools": {"num_pools": 2},
    "private": {"num_pools": 4},
    "recurrent": {"router": "recurrent", "router_state_size": 12, "router_scoring": "norm"},
}


def outputs(model):
    ids = make_ids()
    with torch.no_grad():
        output = model.eval()(ids, labels=ids)
    return output.logits, output.lm_loss


@pytest.mark.parametrize("show", ["split", "hidden"])
@pytest.mark.parametrize("form", FORMS)
def test_growing_by_copies_changes_no_logit_and_no_loss(form, show):
    model, optimizer = make_trained(**FORMS[form])
    logits, loss = outputs(model)
    calibration = getattr(model.model.layers[0].router, "calibration", None)
    origins = resize_pool(model, 10, show=show, optimizer=optimizer)
    grown_logits, grown_loss = outputs(model)
    assert torch.equal(grown_logits, logits)
    assert torch.equal(grown_loss, loss)
    assert getattr(model.model.layers[0].router, "calibration", None) == calibration
    assert model.config.num_experts == 10
    for pool, origin in zip(model.model.pools, origins, strict=True):
        assert origin[:6] == list(range(6))
        assert len(origin) == 10
        assert pool.gate_up_proj.shape[0] == pool.num_experts == 10
        for new, old in enumerate(origin):
            assert torch.equal(pool.down_proj[new], pool.down_proj[old])
    train_step(model.train(), optimizer, 5)


@pytest.mark.any_device
def test_layers_are_dealt_to_an_expert_and_its_copies():
    model, _ = make_trained(num_experts=4)
    load = torch.tensor([[9, 1, 0, 0], [7, 1, 5, 0], [8, 1, 0, 0], [6, 1, 0, 0]])
    origins = resize_pool(model, 7, load=load)
    # 30, 4, 5, 0: two copies of expert 0 (30, then 15 each), then one more of it (10 > 5).
    assert origins == [[0, 1, 2, 3, 0, 0, 0]]
    # By their load on expert 0: layers 0, 2, 1, 3.
    assert model.config.layer_experts == [[0, 1, 2, 3], [5, 1, 2, 3], [4, 1, 2, 3], [6, 1, 2, 3]]
    assert expert_mask(model).sum(1).tolist() == [3] * 4


@pytest.mark.any_device
def test_more_copies_than_layers_stay_hidden():
    model, _ = make_trained(num_hidden_layers=2)
    resize_pool(model, 9, experts=[4, 4, 4])
    assert model.config.layer_experts == [[0, 1, 2, 3, 4, 5], [0, 1, 2, 3, 6, 5]]
    assert (~expert_mask(model)).any(0).tolist() == [True] * 7 + [False] * 2


def test_copies_are_trained_apart_from_the_first_step():
    model, optimizer = make_trained(num_experts_per_tok=6)  # every token goes to all experts
    resize_pool(model, 7, experts=[2], optimizer=optimizer)
    train_step(model.train(), optimizer, 3)
    pool = model.model.pools[0]
    assert pool.down_proj.grad[2].abs().max() > 0
    assert pool.down_proj.grad[6].abs().max() > 0
    assert not torch.equal(pool.down_proj[2], pool.down_proj[6])


def test_the_gradient_of_an_expert_is_shared_among_its_copies():
    model, _ = make_trained(balance="none")
    grown = copy.deepcopy(model)
    resize_pool(grown, 9, experts=[0, 1, 1])
    ids = make_ids()
    for one in (model, grown):
        one.zero_grad()
        one.train()(ids, labels=ids).loss.backward()
    due, grad = (one.model.pools[0].gate_up_proj.grad for one in (model, grown))
    joined = grad[:6].clone()
    joined[0] += grad[6]
    joined[1] += grad[7] + grad[8]
    torch.testing.assert_close(joined, due, rtol=1e-4, atol=1e-6)
    for layer, other in zip(model.model.layers, grown.model.layers, strict=True):
        torch.testing.assert_close(other.router.weight.grad, layer.router.weight.grad)


def test_copies_that_all_see_have_the_rows_of_their_originals():
    model, optimizer = make_trained(router="norm")
    before = [layer.router.weight.detach().clone() for layer in model.model.layers]
    resize_pool(model, 8, experts=[3, 0], show="all", optimizer=optimizer)
    assert model.config.layer_experts is None
    for layer, rows in zip(model.model.layers, before, strict=True):
        assert torch.equal(layer.router.weight, rows[[0, 1, 2, 3, 4, 5, 3, 0]])
        assert layer.router.num_experts == 8
        assert layer.router.calibration == norm_router_calibration(8, 2)
        moments = optimizer.state[layer.router.weight]["exp_avg"]
        assert torch.equal(moments[6:], moments[[3, 0]])
        assert moments.abs().max() > 0


def test_drawn_experts_are_new_and_seen_by_all():
    model, optimizer = make_trained()
    kept = model.model.pools[0].gate_up_proj.detach().clone()
    assert resize_pool(model, 9, add="init", optimizer=optimizer) == [[*range(6), -1, -1, -1]]
    pool = model.model.pools[0]
    assert torch.equal(pool.gate_up_proj[:6], kept)
    assert 0.15 < pool.gate_up_proj[6:].std() < 0.25
    assert model.config.layer_experts is None
    assert not optimizer.state[pool.down_proj]["exp_avg"][6:].any()
    assert optimizer.state[pool.down_proj]["exp_avg"][:6].any()
    train_step(model.train(), optimizer, 3)
    other, _ = make_trained()
    resize_pool(other, 9, add="init", seed=1)
    assert not torch.equal(other.model.pools[0].gate_up_proj[6:], pool.gate_up_proj[6:])


@pytest.mark.parametrize("form", ["norm", "softmax", "recurrent"])
def test_hidden_drawn_experts_change_nothing(form):
    model, _ = make_trained(**FORMS[form])
    logits, loss = outputs(model)
    resize_pool(model, 9, add="init", show="hidden")
    assert torch.equal(outputs(model)[0], logits)
    assert torch.equal(outputs(model)[1], loss)


@pytest.mark.parametrize("form", FORMS)
def test_the_least_loaded_experts_are_dropped(form):
    model, optimizer = make_trained(**FORMS[form])
    load = measure_load(model, [make_ids(seed=4), make_ids(seed=5)])
    slots = 2 * 33 * model.config.num_experts_per_tok
    assert all(slots / 2 < row <= slots for row in load.sum(1).tolist())
    weights = [pool.down_proj.detach().clone() for pool in model.model.pools]
    rows = [layer.router.weight.detach().clone() for layer in model.model.layers]
    origins = resize_pool(model, 4, load=load, optimizer=optimizer)
    for index, (pool, origin) in enumerate(zip(model.model.pools, origins, strict=True)):
        layers = [i for i in range(4) if model.config.pool_index(i) == index]
        total = load[layers].sum(0)
        dropped = [expert for expert in range(6) if expert not in origin]
        assert origin == sorted(origin)
        assert total[dropped].max() <= total[origin].min()
        assert torch.equal(pool.down_proj, weights[index][origin])
        for layer in layers:
            assert torch.equal(model.model.layers[layer].router.weight, rows[layer][origin])
    train_step(model.train(), optimizer, 3)


@pytest.mark.parametrize("form", ["norm", "softmax", "recurrent"])
def test_dropping_what_nobody_sees_changes_nothing(form):
    model, _ = make_trained(**FORMS[form])
    set_layer_experts(model, [[0, 1, 3, 5]] * 4)
    before = outputs(model)[0]
    assert resize_pool(model, 4, load=measure_load(model, [make_ids()])) == [[0, 1, 3, 5]]
    assert model.config.layer_experts is None
    assert torch.equal(outputs(model)[0], before)


def test_copies_dropped_again_give_the_model_back():
    model, optimizer = make_trained()
    before = copy.deepcopy(model.state_dict())
    moments = copy.deepcopy(optimizer.state_dict()["state"])
    resize_pool(model, 8, experts=[1, 1], show="hidden", optimizer=optimizer)
    resize_pool(model, 6, experts=[6, 7], optimizer=optimizer)
    assert model.config.layer_experts is None
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
    for index, state in optimizer.state_dict()["state"].items():
        for key, value in state.items():
            assert torch.equal(value, moments[index][key])


@pytest.mark.any_device
def test_calibration_follows_what_a_layer_still_sees():
    model, _ = make_trained()
    resize_pool(model, 4)
    assert {layer.router.calibration for layer in model.model.layers} == {
        norm_router_calibration(4, 2)
    }


def test_rows_move_with_their_experts():
    model, optimizer = make_trained()
    rows = model.model.layers[1].router.weight.detach().clone()
    moments = optimizer.state[model.model.layers[1].router.weight]["exp_avg"].clone()
    everything = list(range(6))
    set_layer_experts(model, [everything, [4, 0, 2], everything, everything], optimizer=optimizer)
    router = model.model.layers[1].router
    assert torch.equal(router.weight, rows[[4, 0, 2]])
    assert torch.equal(optimizer.state[router.weight]["exp_avg"], moments[[4, 0, 2]])
    assert router.calibration == norm_router_calibration(3, 2)
    output = model(make_ids())
    assert set(output.routings[1].experts.unique().tolist()) <= {0, 2, 4}
    set_layer_experts(model, optimizer=optimizer)
    router = model.model.layers[1].router
    assert torch.equal(router.weight[[0, 2, 4]], rows[[0, 2, 4]])
    assert not optimizer.state[router.weight]["exp_avg"][[1, 3, 5]].any()
    train_step(model.train(), optimizer, 3)


def test_a_resized_model_is_saved_and_loads(tmp_path):
    model, _ = make_trained()
    resize_pool(model, 9)
    model.save_pretrained(tmp_path)
    loaded = UniPoolForCausalLM.from_pretrained(tmp_path).to(devices.current())
    assert loaded.config.layer_experts == model.config.layer_experts is not None
    assert torch.equal(outputs(loaded)[0], outputs(model)[0])


@pytest.mark.any_device
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_experts": 6}, "num_experts must be a positive integer other than M=6, got 6"),
        ({"num_experts": 0}, "num_experts must be a positive integer"),
        ({"num_experts": 1}, r"num_experts_per_tok must be in \[1, 1\]"),
        ({"num_experts": 8, "add": "clone"}, "add must be one of .*'clone'"),
        ({"num_experts": 8, "add": "init", "show": "split"}, "show must be one of .*'split'"),
        ({"num_experts": 8, "add": "init", "experts": [1, 2]}, "experts must be None"),
        ({"num_experts": 8, "experts": [1]}, r"experts must be 2 ids in \[0, M=6\), got \[1\]"),
        ({"num_experts": 8, "experts": [1, 6]}, r"experts must be 2 ids in \[0, M=6\)"),
        ({"num_experts": 4, "experts": [1, 1]}, "experts must be 2 distinct ids"),
        ({"num_experts": 4, "load": torch.ones(3, 6)}, r"load must be \[L=4, M=6\].*got \[3, 6\]"),
        ({"num_experts": 4, "load": torch.full((6,), float("nan"))}, "load must be .*finite"),
    ],
)
def test_what_cannot_be_is_one_clear_line_and_changes_nothing(arguments, message):
    model, _ = make_trained()
    before = outputs(model)[0]
    with pytest.raises(ValueError, match=message) as error:
        resize_pool(model, **arguments)
    assert "\n" not in str(error.value)
    assert torch.equal(outputs(model)[0], before)
    assert model.config.num_experts == 6


@pytest.mark.any_device
def test_other_refusals():
    fresh = make_model(num_experts=6)
    with pytest.raises(ValueError, match="load must be given, or experts"):
        resize_pool(fresh, 8)
    with pytest.raises(TypeError, match="must be a UniPoolForCausalLM, got Linear"):
        resize_pool(torch.nn.Linear(2, 2), 8)
    two, _ = make_trained(num_pools=2)
    with pytest.raises(ValueError, match="a list of ids for each of the 2 pools"):
        resize_pool(two, 7, experts=[1])
    assert resize_pool(two, 7, experts=[[1], [4]]) == [[*range(6), 1], [*range(6), 4]]
    with pytest.raises(ValueError, match=r"layer_experts\[0\] .* got \[9, 1\]"):
        set_layer_experts(two, [[9, 1]] * 4)
