# SPDX-License-Identifier: Apache-2.0
"""What needs no gradient gets none, and all else gets what it would have got."""

import pytest
from pool_stacks import MODES, Stack, assert_equal, expected, gradients, inputs, loss_of

pytestmark = pytest.mark.usefixtures("device")

FROZEN = {
    "gate_up": ["pool.gate_up_proj"],
    "down": ["pool.down_proj"],
    "pool": ["pool.gate_up_proj", "pool.down_proj"],
    "one router": ["routers.1.weight", "routers.1.scale"],
    "a router's scale": ["routers.0.scale"],
    "a router's weight": ["routers.3.weight"],
    "routers": [f"routers.{i}.{name}" for i in range(4) for name in ("weight", "scale")],
    "all but down": [
        "pool.gate_up_proj",
        *(f"routers.{i}.{name}" for i in range(4) for name in ("weight", "scale")),
    ],
    "nothing": [],
}
# Whether layers are recomputed in the backward, and by which of torch's ways.
WAYS = {"plain": None, "nonreentrant": False, "reentrant": True}


def freeze(model, names):
    parameters = dict(model.named_parameters())
    for name in names:
        parameters[name].requires_grad_(False)


@pytest.mark.parametrize("window", [None, 0], ids=["whole", "each"])
@pytest.mark.parametrize("frozen", FROZEN)
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("mode", MODES)
def test_frozen_parameters(mode, way, frozen, window):
    model, x, plain = Stack(mode, wgrad_window_bytes=window), inputs(), inputs()
    model.use_reentrant = WAYS[way]
    freeze(model, FROZEN[frozen])
    loss_of(model(x)).backward()
    wanted = {name: grad for name, grad in expected().items() if name not in FROZEN[frozen]}
    loss_of(Stack("autograd")(plain)).backward()
    assert_equal(gradients(model) | {"x": x.grad}, wanted | {"x": plain.grad})


@pytest.mark.parametrize("frozen", FROZEN)
@pytest.mark.parametrize("way", ["plain", "nonreentrant"])  # reentrant needs an x with a gradient
@pytest.mark.parametrize("mode", MODES)
def test_frozen_input(mode, way, frozen):
    model, x = Stack(mode), inputs().requires_grad_(False)
    model.use_reentrant = WAYS[way]
    freeze(model, FROZEN[frozen])
    loss_of(model(x)).backward()
    assert x.grad is None
    wanted = {name: grad for name, grad in expected().items() if name not in FROZEN[frozen]}
    assert_equal(gradients(model), wanted)


@pytest.mark.parametrize("mode", MODES)
def test_all_parameters_frozen(mode):
    model, x, plain = Stack(mode), inputs(), inputs()
    model.requires_grad_(False)
    loss_of(model(x)).backward()
    assert gradients(model) == {}
    loss_of(Stack("autograd")(plain)).backward()
    assert_equal({"x": x.grad}, {"x": plain.grad})
    assert not model(x.detach()).requires_grad


@pytest.mark.parametrize("mode", MODES)
def test_thawed_again(mode):
    """A pass asks its parameters anew."""
    model = Stack(mode)
    freeze(model, FROZEN["down"])
    loss_of(model(inputs())).backward()
    model.pool.down_proj.requires_grad_(True)
    model.zero_grad()
    loss_of(model(inputs())).backward()
    assert_equal(gradients(model), expected())


@pytest.mark.parametrize("mode", [mode for mode in MODES if mode != "autograd"])
@pytest.mark.parametrize(("frozen", "merges"), [("gate_up", True), ("down", True), ("pool", False)])
def test_a_pass_merges_the_gradient_of_what_is_left(mode, frozen, merges):
    model = Stack(mode)
    freeze(model, FROZEN[frozen])
    assert (model.pool.begin_pass().collector is not None) is merges
