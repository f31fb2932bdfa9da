# SPDX-License-Identifier: Apache-2.0
"""Conversions between layer-private and shared pools, and from and to Mixtral."""

import pytest
import torch

pytest.importorskip("transformers")

import devices
import small_models
from commands import output, refusal
from small_models import make_ids
from transformers import (
    AutoModelForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    OlmoeConfig,
    Qwen3MoeConfig,
)

from unipool.models import UniPoolForCausalLM, parameter_counts
from unipool.models.convert import (
    check_mixtral,
    from_mixtral,
    to_mixtral,
    to_private,
    to_shared,
)
from unipool.models.resize import expert_mask, set_layer_experts
from unipool.nn.router import norm_router_calibration

pytestmark = pytest.mark.usefixtures("device")

SOURCES = {
    "softmax": {"router": "softmax", "balance": "layer", "balance_delay": 0},
    "softmax-renormalized": {"router": "softmax", "balance": "layer", "norm_topk_prob": True},
    "norm": {"balance": "layer"},
    "norm-top1": {"num_experts_per_tok": 1},
    "norm-unbalanced": {"balance": "none"},
    "two-pools": {"num_pools": 2},
    "three-pools": {"num_pools": 3, "balance": "layer"},
    "two-pools-by-layer": {"num_pools": 2, "balance": "layer", "balance_delay": 0},
    "recurrent": {"router": "recurrent", "router_state_size": 12},
    "recurrent-norm": {"router": "recurrent", "router_state_size": 12, "router_scoring": "norm"},
    "tied-biased": {"tie_word_embeddings": True, "attention_bias": True},
}
MIXTRAL = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_local_experts": 6,
    "initializer_range": 0.2,
}


def make_model(**options) -> UniPoolForCausalLM:
    """A model that has seen one micro-batch, so that its balance losses have a state."""
    model = small_models.make_model(**({"num_experts": 6, "num_pools": 4} | options))
    model.train()(make_ids(seed=3))
    return model.eval()


def make_mixtral(**options) -> MixtralForCausalLM:
    torch.manual_seed(0)
    return MixtralForCausalLM(MixtralConfig(**(MIXTRAL | options))).to(devices.current()).eval()


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(make_ids()).logits


def assert_equal_states(actual, expected):
    state = expected.state_dict()
    assert actual.state_dict().keys() == state.keys()
    for name, value in actual.state_dict().items():
        assert torch.equal(value, state[name]), name


# --- private to shared ---


@pytest.mark.parametrize("source", SOURCES)
def test_one_pool_has_the_same_outputs_bit_for_bit(source):
    model = make_model(**SOURCES[source])
    before = logits(model)
    shared = to_shared(model)
    assert len(shared.model.pools) == 1
    assert shared.config.num_experts == model.config.num_pools * 6
    assert torch.equal(logits(shared), before)
    assert torch.equal(logits(model), before)
    assert not {p.data_ptr() for p in shared.parameters()} & {
        p.data_ptr() for p in model.parameters()
    }


@pytest.mark.parametrize("source", [s for s in SOURCES if s != "three-pools"])
def test_the_training_loss_and_its_gradients_stay(source):
    model = make_model(**SOURCES[source]).train()
    shared = to_shared(model).train()
    for seed in range(3):  # the second and third with the delayed state that the first left
        ids = make_ids(seed=seed)
        expected, actual = model(ids, labels=ids), shared(ids, labels=ids)
        assert torch.equal(actual.lm_loss, expected.lm_loss)
        torch.testing.assert_close(actual.aux_loss, expected.aux_loss, rtol=1e-5, atol=1e-7)
    expected.loss.backward()
    actual.loss.backward()
    pools = [pool.down_proj.grad for pool in model.model.pools]
    torch.testing.assert_close(shared.model.pools[0].down_proj.grad, torch.cat(pools))
    for layer, mine in zip(model.model.layers, shared.model.layers, strict=True):
        assert layer.router.weight.grad.abs().max() > 0
        torch.testing.assert_close(mine.router.weight.grad, layer.router.weight.grad)


def test_loads_are_those_of_the_pool_and_masks_say_what_is_hidden():
    model = make_model()
    shared = to_shared(model)
    load = shared(make_ids()).load
    mask = expert_mask(shared)
    assert load.shape == mask.shape == (4, 24)
    assert not load[mask].any()
    assert torch.equal(load[~mask].view(4, 6), model(make_ids()).load)
    assert mask.sum(1).tolist() == [18] * 4
    assert mask.sum(0).tolist() == [3] * 24


@pytest.mark.any_device
def test_the_calibration_is_that_of_what_a_layer_sees():
    shared = to_shared(make_model())
    assert {layer.router.calibration for layer in shared.model.layers} == {
        norm_router_calibration(6, 2)
    }
    set_layer_experts(shared)
    assert {layer.router.calibration for layer in shared.model.layers} == {
        norm_router_calibration(24, 2)
    }


@pytest.mark.parametrize("source", ["softmax", "norm", "recurrent-norm", "tied-biased"])
def test_what_layers_see_is_saved(tmp_path, source):
    shared = to_shared(make_model(**SOURCES[source]))
    expected = logits(shared)
    shared.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).to(devices.current())
    assert loaded.config.layer_experts == [list(range(6 * i, 6 * i + 6)) for i in range(4)]
    assert torch.equal(logits(loaded), expected)
    assert_equal_states(loaded, shared)
    total = sum(parameter.numel() for parameter in shared.parameters())
    assert parameter_counts(shared.config)["total"] == total


def test_bfloat16_keeps_its_dtypes():
    model = make_model().to(torch.bfloat16)
    for layer in model.model.layers:
        layer.router.scale.data = layer.router.scale.data.float()
    shared = to_shared(model)
    for name, value in shared.state_dict().items():
        full = "scale" in name or "fraction" in name
        assert full or value.dtype == torch.bfloat16, name
    assert shared.model.layers[0].router.scale.dtype == torch.float32
    assert torch.equal(logits(shared), logits(model))


@pytest.mark.parametrize("source", ["norm", "softmax", "recurrent"])
def test_every_layer_may_then_use_the_whole_pool(source):
    shared = to_shared(make_model(**SOURCES[source])).train()
    rows = [layer.router.weight.detach().clone() for layer in shared.model.layers]
    optimizer = torch.optim.AdamW(shared.parameters(), lr=1e-2)
    ids = make_ids()
    shared(ids, labels=ids).loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    set_layer_experts(shared, optimizer=optimizer)
    assert shared.config.layer_experts is None
    assert all(r.shape[0] == 6 for r in rows)
    losses = []
    for _ in range(8):
        output = shared(ids, labels=ids)
        losses.append(output.lm_loss.item())
        output.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0]
    assert (output.load > 0).sum(1).min() > 6  # more than a layer had of its own


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable.*:FutureWarning")
def test_a_shared_pool_of_subsets_generates_and_checkpoints():
    model = make_model()
    shared = to_shared(model)
    prompt = make_ids(2, 5)
    arguments = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(shared.generate(prompt, **arguments), model.generate(prompt, **arguments))
    ids = make_ids()
    grads = []
    for enable in (False, True):
        again = to_shared(model).train()
        if enable:
            again.gradient_checkpointing_enable()
        again(ids, labels=ids).loss.backward()
        grads.append([parameter.grad for parameter in again.parameters()])
    for plain, recomputed in zip(*grads, strict=True):
        torch.testing.assert_close(recomputed, plain)


def test_subsets_compile_without_graph_breaks():
    shared = to_shared(make_model())
    compiled = torch.compile(shared, backend="eager", fullgraph=True)
    with torch.no_grad():
        actual = compiled(make_ids(), use_cache=False).logits
    torch.testing.assert_close(actual, logits(shared))


# --- and back ---


@pytest.mark.parametrize("source", SOURCES)
def test_there_and_back_is_the_same_model(source):
    model = make_model(**SOURCES[source])
    back = to_private(to_shared(model), model.config.num_pools)
    assert back.config.layer_experts is None
    assert back.config.balance_coefficient == pytest.approx(0.1)
    same_kind = back.config.balance == model.config.balance
    assert same_kind or model.config.num_pools == 4  # where "layer" and "pool" are the same loss
    assert torch.equal(logits(back), logits(model))
    weights = {n: v for n, v in model.state_dict().items() if "fraction" not in n}
    for name, value in weights.items():
        assert torch.equal(back.state_dict()[name], value), name
    for mine, balancer in zip(back.model.balancers, model.model.balancers, strict=True):
        torch.testing.assert_close(mine.fraction, balancer.fraction)


def test_one_pool_for_all_may_be_untied():
    model = make_model(num_pools=1)
    with pytest.raises(ValueError, match="expert 0 in several"):
        to_private(model)
    private = to_private(model, untie=True)
    assert (private.config.num_pools, private.config.num_experts) == (4, 6)
    assert torch.equal(logits(private), logits(model))


def test_experts_that_nobody_sees_are_left_out():
    model = make_model(num_pools=1, num_experts=12)
    set_layer_experts(model, [[0, 5], [1, 4], [2, 10], [9, 3]])
    private = to_private(model)
    assert private.config.num_experts == 2
    assert torch.equal(logits(private), logits(model))
    for pool, ids in enumerate(model.config.layer_experts):
        due = model.model.pools[0].down_proj[ids]
        assert torch.equal(private.model.pools[pool].down_proj, due)


# --- Mixtral ---


@pytest.mark.parametrize("implementation", ["eager", "unipool"])
def test_mixtral_becomes_layer_private_and_shared(implementation):
    import unipool.integrations.transformers  # noqa: F401

    mixtral = make_mixtral()
    mixtral.set_experts_implementation(implementation)
    ours = from_mixtral(mixtral)
    torch.testing.assert_close(logits(ours), logits(mixtral), rtol=1e-4, atol=1e-4)
    assert logits(mixtral).std() > 0.1
    shared = to_shared(ours)
    assert shared.config.num_experts == 18
    assert torch.equal(logits(shared), logits(ours))
    back = to_mixtral(to_private(shared))
    assert_equal_states(back, mixtral)
    back.set_experts_implementation(implementation)
    assert torch.equal(logits(back), logits(mixtral))


def test_mixtral_gradients_agree():
    mixtral, ids = make_mixtral().train(), make_ids()
    ours = from_mixtral(mixtral)
    assert ours.training
    mixtral(ids, labels=ids).loss.backward()
    ours(ids, labels=ids).lm_loss.backward()
    for index, layer in enumerate(mixtral.model.layers):
        for due, grad in (
            (layer.mlp.experts.gate_up_proj, ours.model.pools[index].gate_up_proj),
            (layer.mlp.gate.weight, ours.model.layers[index].router.weight),
        ):
            scale = due.grad.abs().max().item()
            torch.testing.assert_close(grad.grad, due.grad, rtol=1e-3, atol=1e-4 * scale)


# --- refusals ---


@pytest.mark.any_device
@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: to_shared(make_model(num_pools=1)), "to_shared: model must have at least 2 pools"),
        (
            lambda: to_shared(make_mixtral()),
            "must be a UniPoolForCausalLM, got Mixtral",
        ),
        (lambda: to_shared(make_model(), "both"), "to_shared: balance must be one of .*'both'"),
        (lambda: to_shared(make_model(num_pools=2), "layer"), "balance must be 'pool' or 'none'"),
        (
            lambda: to_shared(make_model(balance="none"), "pool"),
            "balance must be 'none'",
        ),
        (lambda: to_private(make_model()), r"num_pools must be in \[5, L=4\].*got 4"),
        (
            lambda: to_private(to_shared(make_model()), 2),
            "layers of one new pool must see the same experts.*layers 0 and 1",
        ),
        (lambda: to_mixtral(make_model()), "to_mixtral: router must be 'softmax', got 'norm'"),
        (lambda: to_mixtral(to_shared(make_model())), "to_mixtral: num_pools must be 4, got 1"),
        (lambda: from_mixtral(make_mixtral(sliding_window=8)), "sliding_window .* got 8"),
        (lambda: from_mixtral(make_mixtral(num_experts_per_tok=1)), "norm_topk_prob must be False"),
        (lambda: from_mixtral(make_mixtral(hidden_act="gelu")), 'hidden_act must be "silu"'),
        (lambda: check_mixtral(OlmoeConfig()), "got 'olmoe': its attention normalizes"),
        (lambda: check_mixtral(Qwen3MoeConfig()), "got 'qwen3_moe': its attention normalizes"),
        (lambda: make_model(layer_experts=[[0, 1]]), "num_hidden_layers=4 lists"),
        (
            lambda: make_model(layer_experts=[[0, 1]] * 3 + [[0, 6]]),
            r"layer_experts\[3\].*\[0, 6\]",
        ),
        (lambda: make_model(layer_experts=[[0, 0]] * 4), r"layer_experts\[0\] .* distinct"),
        (lambda: make_model(layer_experts=[[0]] * 4), "at least num_experts_per_tok=2"),
    ],
)
def test_what_cannot_be_is_one_clear_line(call, message):
    with pytest.raises((ValueError, TypeError), match=message) as error:
        call()
    assert "\n" not in str(error.value)


@pytest.mark.any_device
def test_unequal_layers_cannot_be_private():
    model = make_model(num_pools=1)
    set_layer_experts(model, [[0, 1], [2, 3, 4], [0, 1], [0, 1]])
    with pytest.raises(ValueError, match="got 2 in layer 0 and 3 in layer 1"):
        to_private(model, untie=True)


# --- command ---


@pytest.mark.any_device
def test_command_converts_there_and_back(tmp_path, capsys):
    pytest.importorskip("typer")
    make_mixtral().save_pretrained(tmp_path / "mixtral")
    (tmp_path / "mixtral" / "tokenizer.json").write_text("{}")
    shared = (tmp_path / "mixtral", tmp_path / "shared", "--to", "shared")
    assert "1 x 18 experts" in output(capsys, "convert", *shared)
    assert (tmp_path / "shared" / "tokenizer.json").exists()
    back = (tmp_path / "shared", tmp_path / "back", "--to", "mixtral")
    assert "Mixtral of 3 x 6 experts" in output(capsys, "convert", *back)
    back = MixtralForCausalLM.from_pretrained(tmp_path / "back")
    assert torch.equal(logits(back), logits(make_mixtral()))


@pytest.mark.any_device
def test_command_refuses_in_one_line(tmp_path, capsys):
    pytest.importorskip("typer")
    make_model(num_pools=1).save_pretrained(tmp_path / "one")
    OlmoeConfig(vocab_size=64, hidden_size=16).save_pretrained(tmp_path / "olmoe")
    (tmp_path / "olmoe" / "model.safetensors").write_bytes(bytes(1 << 20))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    for arguments, message in [
        (("nowhere", "new", "--to", "shared"), "nowhere is not a folder"),
        (("one", "new", "--to", "shared"), "--to shared: the model has one pool already"),
        (("one", "new", "--to", "private"), "--untie"),
        (("one", "full", "--to", "private"), "full exists already"),
        (("one", "new", "--to", "private", "--balance", "pool"), "--balance must be left out"),
        (("one", "new", "--to", "shared", "--untie"), "--untie must be left out"),
        (("olmoe", "new", "--to", "shared"), "got 'olmoe'"),
        (("one", "new", "--to", "public"), "--to"),
    ]:
        source, out, *rest = arguments
        assert message in refusal(capsys, "convert", tmp_path / source, tmp_path / out, *rest)
        assert not (tmp_path / "new").exists()
