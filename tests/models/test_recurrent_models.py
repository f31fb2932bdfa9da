# SPDX-License-Identifier: Apache-2.0
"""Models with the recurrent router: gradients, checkpointing, compilation, generation, training."""

import json

import devices
import pytest
import torch
from commands import refusal
from small_models import SHAPE, make_ids, make_model
from torch import Tensor, nn

from unipool import reference
from unipool.models import UniPoolConfig, UniPoolForCausalLM, parameter_counts, preset
from unipool.nn.router import norm_router_calibration

pytestmark = pytest.mark.usefixtures("device")

GRU = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
OPTIONS = {"router": "recurrent", "router_state_size": 12}


def make_recurrent(**options) -> UniPoolForCausalLM:
    return make_model(**(OPTIONS | options)).train()


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def use_transcription(model: UniPoolForCausalLM) -> None:
    """Let the model route by the reference, which passes the state on by itself."""
    states: list[Tensor] = []

    def route(layer, x, cell, state, mask=None):
        router, gru = model.model.layers[layer].router, dict(cell.named_parameters())
        before = None if layer == 0 else states[layer - 1]
        del states[layer:]
        z, after = reference.recurrent_logits(x, router.proj.weight, router.weight, gru, before)
        states.append(after)
        k = router.top_k
        if router.scoring == "norm":
            c = norm_router_calibration(router.num_experts, k)
            return reference.norm_topk(z, router.scale, k, calibration=c), after
        return reference.softmax_topk(z, k, renormalize=router.renormalize), after

    for index, layer in enumerate(model.model.layers):
        layer.router.forward = lambda *a, index=index: route(index, *a)


@pytest.mark.parametrize("num_pools", [1, 2, 4])
@pytest.mark.parametrize("kind", ["softmax", "norm"])
def test_model_equals_the_transcription(kind, num_pools):
    options = {"router_scoring": kind, "num_pools": num_pools, "balance_delay": 0}
    model, twin = (make_recurrent(**options).to(devices.widest_float()) for _ in range(2))
    use_transcription(twin)
    ids = make_ids(2, 6)
    output, due = model(ids, labels=ids), twin(ids, labels=ids)
    assert torch.equal(output.load, due.load)
    # float32 of four layers, whose logits and gradients sum terms that may cancel
    wide = devices.widest_float() == torch.float64
    close = {"rtol": 1e-9, "atol": 1e-10} if wide else {"rtol": 1e-4, "atol": 1e-4}
    torch.testing.assert_close(output.logits, due.logits, **close)
    torch.testing.assert_close(output.loss, due.loss, rtol=1e-9 if wide else 1e-5, atol=0)
    output.loss.backward()
    due.loss.backward()
    expected = gradients(twin)
    assert [n for n in expected if "router_cell" in n] == [f"model.router_cell.{n}" for n in GRU]
    for name, grad in gradients(model).items():
        assert expected[name].abs().max() > 0, name
        close = {"rtol": 1e-7, "atol": 1e-10} if wide else {"rtol": 1e-3, "atol": 1e-5}
        torch.testing.assert_close(grad, expected[name], **close, msg=name)


@pytest.mark.parametrize("padding", [False, True])
@pytest.mark.parametrize("kind", ["softmax", "norm"])
@pytest.mark.parametrize("reentrant", [False, True], ids=["non_reentrant", "reentrant"])
@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable.*:FutureWarning")
def test_gradient_checkpointing_changes_nothing(reentrant, kind, padding):
    model, twin = (make_recurrent(router_scoring=kind) for _ in range(2))
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    calls = []
    for layer in model.model.layers:
        layer.self_attn.register_forward_hook(lambda *_: calls.append(1))
    mask = torch.ones(2, 6, dtype=torch.long, device=devices.current())
    if padding:
        mask[0, 4:] = 0
    for step in range(2):
        ids = make_ids(2, 6, seed=step)
        outputs = [each(ids, labels=ids, attention_mask=mask) for each in (model, twin)]
        for output in outputs:
            output.loss.backward()
        torch.testing.assert_close(outputs[0].loss, outputs[1].loss, rtol=1e-6, atol=1e-6)
        assert torch.equal(outputs[0].load, outputs[1].load)
    assert len(calls) == 2 * 2 * 4, "each layer must have been recomputed once per step"
    expected = gradients(twin)
    for name, grad in gradients(model).items():
        assert expected[name].abs().max() > 0, name
        torch.testing.assert_close(grad, expected[name], rtol=1e-4, atol=1e-5, msg=name)


def test_padding_has_no_part_in_the_recurrence():
    model = make_recurrent(balance_delay=0)
    first, second = make_ids(1, 4), make_ids(1, 6, seed=2)
    mask = torch.ones(2, 6, dtype=torch.long, device=devices.current())
    mask[0, 4:] = 0
    batch = torch.cat([nn.functional.pad(first, (0, 2)), second])
    output, alone = model(batch, attention_mask=mask), [model(ids) for ids in (first, second)]
    assert torch.equal(output.load, alone[0].load + alone[1].load)
    torch.testing.assert_close(output.logits[:1, :4], alone[0].logits, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(output.logits[1:], alone[1].logits, rtol=1e-4, atol=1e-5)


def test_under_autocast_the_model_routes_in_float32():
    model = make_recurrent()
    cells = []
    model.model.layers[2].router.register_forward_hook(lambda *a: cells.append(a[2][1]))
    ids = make_ids(2, 6)
    with torch.autocast(devices.current().type, torch.bfloat16):
        output = model(ids, labels=ids)
    output.loss.backward()
    assert cells[0].dtype == torch.float32
    assert output.routings[2].weights.dtype == torch.float32
    assert all(p.grad.isfinite().all() for p in model.parameters())


def test_one_cell_for_all_pools_is_saved_once(tmp_path):
    model = make_recurrent(num_pools=4, router_scoring="norm", num_experts_per_tok=1)
    model.save_pretrained(tmp_path)
    cells = [name for name in model.state_dict() if "cell" in name]
    assert cells == [f"model.router_cell.{name}" for name in GRU]
    loaded = UniPoolForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    loaded = loaded.to(devices.current()).train()
    wide = {n for n, t in loaded.state_dict().items() if t.dtype == torch.float32}
    assert wide == {n for n in loaded.state_dict() if "router.scale" in n or "balancers" in n}
    ids = make_ids(2, 6)
    output, expected = loaded(ids, labels=ids), model(ids, labels=ids)
    assert abs(output.loss - expected.loss) < 0.05 * expected.loss
    output.loss.backward()
    assert all(p.grad.isfinite().all() for p in loaded.parameters())
    kept = json.loads((tmp_path / "config.json").read_text())
    assert (kept["router"], kept["router_state_size"], kept["router_scoring"]) == (
        "recurrent",
        12,
        "norm",
    )


@pytest.mark.any_device
def test_model_starts_with_its_own_spread():
    torch.manual_seed(0)
    model = UniPoolForCausalLM(preset("tiny", router="recurrent", router_state_size=48))
    for name, parameter in model.named_parameters():
        if "norm" in name:
            assert (parameter == 1).all(), name
        elif "bias" in name:
            assert (parameter == 0).all(), name
        else:
            assert parameter.std().item() == pytest.approx(
                model.config.initializer_range, rel=0.1
            ), name


@pytest.mark.any_device
def test_sizes_and_scores_by_default():
    config = UniPoolConfig(**(SHAPE | OPTIONS | {"router_state_size": None}))
    assert (config.router_state_size, config.router_scoring) == (32, "softmax")
    wide = preset("182m", router="recurrent")
    assert wide.router_state_size == 256
    norm = UniPoolConfig(**SHAPE)
    assert norm.router_state_size is norm.router_scoring is None


@pytest.mark.any_device
@pytest.mark.parametrize("form", ["unipool", "vanilla"])
@pytest.mark.parametrize("kind", ["softmax", "norm"])
def test_parameter_counts(form, kind):
    config = preset("tiny", form, router="recurrent", router_state_size=20, router_scoring=kind)
    with torch.device("meta"):
        model = UniPoolForCausalLM(config)
    assert parameter_counts(config)["total"] == sum(p.numel() for p in model.parameters())


# --- training


def test_train_command(tmp_path, monkeypatch, capfd):
    pytest.importorskip("typer")
    from unipool import cli

    monkeypatch.setenv("UNIPOOL_CACHE", str(tmp_path / "cache"))
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog\n" * 400)
    out = tmp_path / "run"
    small = ["--d-model", "32", "--d-ff", "32", "--layers", "2", "--heads", "2", "--pool-size", "4"]
    small += ["--seq-len", "32", "--batch-size", "4", "--eval-tokens", "256"]
    small += ["--device", devices.current().type]
    small += ["--data", str(text)]
    recurrent = ["--router", "recurrent", "--router-state-size", "8", "--router-scoring", "norm"]
    steps = ["--steps", "2", "--log-every", "1"]
    assert cli.main(["train", *small, *recurrent, *steps, "--out", str(out)]) == 0
    model = UniPoolForCausalLM.from_pretrained(out / "model")
    assert model.config.router_scoring == "norm"
    assert model.model.router_cell.hidden_size == 8
    more = ["train", "--resume", "--out", str(out), "--steps", "3"]
    assert cli.main(more) == 0
    bad = ["train", *small, "--router-state-size", "8", "--out", tmp_path / "bad"]
    assert "router_state_size must be None unless router" in refusal(capfd, *bad)
