# SPDX-License-Identifier: Apache-2.0
"""The routing probe on models for which the cost of random routing is known."""

import json
import math
import shutil
import statistics
import sysconfig
from pathlib import Path

import devices
import pytest
import torch
from commands import on_device, refused_on_device

pytest.importorskip("typer")
pytest.importorskip("transformers")

from torch.nn import functional as F
from transformers import MixtralConfig, MixtralForCausalLM, OlmoeConfig, OlmoeForCausalLM

from unipool import cli
from unipool.analysis import probe
from unipool.analysis.collect import Choice, routed_layers, score
from unipool.analysis.probe import random_routing, run_probe
from unipool.data.tokenizer import ByteTokenizer
from unipool.errors import InputError
from unipool.files import latest_checkpoint
from unipool.models import UniPoolForCausalLM, preset

pytestmark = pytest.mark.usefixtures("small_scale", "device")

STDLIB = Path(sysconfig.get_path("stdlib"))


def real_text(tokens=4096, length=64):
    """Batches of the bytes of a file of the standard library."""
    ids = torch.tensor(list((STDLIB / "argparse.py").read_bytes()[:tokens])).view(-1, length)
    ids = ids.to(devices.current())
    return lambda: iter(ids.split(16))


def our_model(**options):
    options = {"num_hidden_layers": 2, "num_experts": 6, "initializer_range": 0.3} | options
    return UniPoolForCausalLM(preset("tiny", **options)).to(devices.current()).eval()


def hugging_face(family):
    sizes = {"vocab_size": 320, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 64}
    sizes |= {"initializer_range": 0.3, "num_experts_per_tok": 2}
    if family == "mixtral":
        model = MixtralForCausalLM(MixtralConfig(**sizes, num_local_experts=6))
    else:
        model = OlmoeForCausalLM(OlmoeConfig(**sizes, num_experts=6, norm_topk_prob=True))
    return model.to(devices.current()).eval()


def experts_of(model, layer):
    return model.model.pools[-1] if hasattr(model.model, "pools") else layer.mlp.experts


# --- what must cost nothing


@pytest.mark.parametrize("weights", ["rule", "kept"])
@pytest.mark.parametrize("family", ["ours", "mixtral", "olmoe"])
def test_a_layer_whose_experts_do_nothing_costs_nothing(family, weights):
    model = our_model(num_pools=2) if family == "ours" else hugging_face(family)
    with torch.no_grad():
        experts_of(model, model.model.layers[1]).down_proj.zero_()
    found = run_probe(model, real_text(1024), seeds=(0, 1), weights=weights)
    first, second = found.layers
    assert (second.loss_increase, second.accuracy_drop) == (0.0, 0.0)
    assert (second.loss_spread, second.accuracy_spread) == (0.0, 0.0)
    assert first.loss != [found.loss] * 2
    assert first.loss[0] != first.loss[1]


@pytest.mark.parametrize(
    ("family", "weights"),
    [("softmax", "rule"), ("norm", "kept"), ("mixtral", "rule"), ("olmoe", "rule")],
)
def test_equal_experts_cost_nothing(family, weights):
    """Whoever is drawn does the same, where the weights sum to one or stay as they are."""
    if family == "softmax":
        model = our_model(router="softmax", norm_topk_prob=True, num_experts_per_tok=2, num_pools=2)
    else:
        model = our_model(num_pools=2) if family == "norm" else hugging_face(family)
    with torch.no_grad():
        for parameter in experts_of(model, model.model.layers[1]).parameters():
            parameter.copy_(parameter[:1].clone().expand_as(parameter))
    found = run_probe(model, real_text(1024), seeds=(0,), weights=weights)
    assert found.layers[1].loss_increase == pytest.approx(0.0, abs=1e-5)
    assert found.layers[0].loss[0] != pytest.approx(found.loss, abs=1e-4)
    assert found.layers[0].loss_spread is None


# --- what must cost a known amount


def constant_model(router, num_experts=5, **options):
    """One layer, no attention, one embedding for all tokens: the logits depend on nothing but the
    expert that a token gets."""
    torch.manual_seed(3)
    model = our_model(num_hidden_layers=1, num_experts=num_experts, router=router, **options)
    with torch.no_grad():
        embedding = model.model.embed_tokens.weight
        embedding.copy_(embedding[:1].clone().expand_as(embedding))
        model.model.layers[0].self_attn.o_proj.weight.zero_()
    return model


def states_by_expert(model, weights_of):
    """[M, D] final states of any token that expert e serves with its weight, in plain PyTorch."""
    layer, pool = model.model.layers[0], model.model.pools[0]
    row = model.model.embed_tokens.weight[0].double()
    eps = model.config.rms_norm_eps
    x = row / torch.sqrt(row.square().mean() + eps) * layer.post_attention_layernorm.weight
    weights = weights_of(layer.router.weight.double() @ x)
    states = []
    for expert in range(model.config.num_experts):
        gate, up = (pool.gate_up_proj[expert].double() @ x).chunk(2)
        y = row + weights[expert] * (pool.down_proj[expert].double() @ (F.silu(gate) * up))
        states.append(y / torch.sqrt(y.square().mean() + eps) * model.model.norm.weight)
    return torch.stack(states)


@pytest.mark.parametrize("router", ["softmax", "norm"])
@pytest.mark.parametrize("weights", ["rule", "kept"])
@torch.no_grad()
def test_the_loss_under_random_experts_is_the_mean_over_experts(router, weights):
    model = constant_model(router)
    z = []

    def weights_of(logits):
        z.append(logits)
        if router == "softmax":
            scores = torch.softmax(logits, 0)
        else:
            learned = model.model.layers[0].router
            scores = learned.calibration * torch.relu(logits / torch.linalg.vector_norm(logits))
        return scores if weights == "rule" else scores.max().expand_as(scores)

    states = states_by_expert(model, weights_of)
    chosen = int(z[0].argmax())
    targets = torch.cat([ids[:, 1:].flatten() for ids in real_text()()])
    # With the expert that the router chose the output is the bytes' frequency, with others not.
    frequency = (torch.bincount(targets, minlength=256) + 1).double().log()
    aims = torch.full((len(states), 1), -0.3).to(states)
    aims[chosen] = 1.0
    model.lm_head.weight.copy_(frequency[:, None] * (torch.linalg.pinv(states) @ aims).T)
    log_p = torch.log_softmax(states @ model.lm_head.weight.double().T, 1)
    losses = -log_p[:, targets]

    seeds = range(4)
    found = run_probe(model, real_text(), seeds=seeds, weights=weights)
    assert found.loss == pytest.approx(losses[chosen].mean().item(), abs=1e-4)
    # Each token's expert is drawn by itself: variances over experts add up.
    error = math.sqrt(losses.var(0, correction=0).sum().item() / len(seeds)) / losses.shape[1]
    mean = statistics.fmean(found.layers[0].loss)
    assert abs(mean - losses.mean().item()) < 5 * error
    assert losses.mean().item() - found.loss > 50 * error  # five of them can tell


def test_drops_and_spreads_are_those_of_the_single_evaluations():
    model = our_model()
    found = run_probe(model, real_text(1024), seeds=(4, 7), layers=[1])
    assert (found.seeds, [layer.layer for layer in found.layers]) == ([4, 7], [1])
    base = score(model, real_text(1024)())
    outputs = [(model(input_ids=ids).logits[:, :-1], ids[:, 1:]) for ids in real_text(1024)()]
    logits = torch.cat([logit.flatten(0, 1) for logit, _ in outputs]).double()
    targets = torch.cat([target.flatten() for _, target in outputs])
    assert base.tokens == found.tokens == len(targets)
    assert base.loss == pytest.approx(F.cross_entropy(logits, targets).item(), abs=1e-6)
    assert base.accuracy == (logits.argmax(1) == targets).double().mean().item()
    entry = found.layers[0]
    a, b = entry.loss
    assert entry.loss_increase == pytest.approx((a + b) / 2 - base.loss, abs=1e-12)
    assert entry.loss_spread == pytest.approx(abs(a - b) / math.sqrt(2), abs=1e-12)
    a, b = entry.accuracy
    assert entry.accuracy_drop == pytest.approx(base.accuracy - (a + b) / 2, abs=1e-12)
    assert entry.accuracy_spread == pytest.approx(abs(a - b) / math.sqrt(2), abs=1e-12)
    alone = run_probe(model, real_text(1024), seeds=(4, 7)).layers[1]
    assert alone == entry  # whatever else is probed
    assert not any(layer.router._forward_hooks for layer in routed_layers(model))


# --- the draw


@pytest.mark.any_device
def test_each_layer_and_seed_has_a_stream_of_its_own(monkeypatch):
    """Equal in each call, and so whatever else is probed."""
    usual, streams = probe.random_routing, []

    def recorded(layer, weights, generator):
        copy = torch.Generator()
        copy.set_state(generator.get_state())
        streams.append((layer.index, tuple(torch.rand(16, generator=copy).tolist())))
        return usual(layer, weights, generator)

    monkeypatch.setattr(probe, "random_routing", recorded)
    model, seeds = our_model(num_hidden_layers=3), (0, 1, 2, 3, 100_003)
    run_probe(model, real_text(128), seeds=seeds)
    assert [layer for layer, _ in streams] == [n for n in range(3) for _ in seeds]
    assert len({draws for _, draws in streams}) == 3 * len(seeds)
    first = list(streams)
    streams.clear()
    run_probe(model, real_text(128), layers=[2], seeds=seeds)
    assert streams == first[2 * len(seeds) :]


@pytest.mark.any_device
@pytest.mark.parametrize("k", [1, 3])
def test_draws_are_uniform_distinct_and_weighted_by_the_rule(k):
    model = our_model(router="softmax", num_experts_per_tok=k, norm_topk_prob=k > 1)
    layer = routed_layers(model)[0]
    tokens = 6000
    scores = torch.softmax(torch.randn(tokens, 6), dim=1)
    learned = scores.topk(k, dim=1)
    allowed = torch.tensor([True, True, False, True, True, True])
    choice = Choice(scores, learned.values, learned.indices, allowed)
    generator = torch.Generator().manual_seed(0)
    weights, experts = random_routing(layer, "rule", generator)(choice)
    counts = torch.bincount(experts.flatten(), minlength=6)
    assert counts[2] == 0
    expected = tokens * k / 5
    assert (counts[allowed] - expected).abs().max() < 5 * math.sqrt(expected)
    for t in range(0, tokens, 500):
        ids = experts[t].tolist()
        assert len(set(ids)) == k
        gates = [scores[t, e].item() for e in ids]
        total = sum(gates) if k > 1 else 1.0
        assert weights[t].tolist() == pytest.approx([g / total for g in gates], rel=1e-5)
    kept, _ = random_routing(layer, "kept", generator)(choice)
    assert torch.equal(kept, learned.values)
    few = torch.tensor([False, True, False, False, False, False])
    weights, experts = random_routing(layer, "rule", generator)(choice._replace(allowed=few))
    assert experts[:, 0].eq(1).all()
    assert experts[:, 1:].eq(-1).all()
    assert weights[:, 1:].eq(0).all()


@pytest.mark.parametrize("router", ["norm", "softmax", "recurrent"])
def test_the_replaced_routing_is_the_one_that_is_reported(router):
    """What the model returns under a probe is what it used: ids, weights and load agree."""
    model = our_model(router=router, num_experts_per_tok=2)
    layer = routed_layers(model)[1]
    ids = next(real_text()())
    with torch.no_grad():
        before = model(input_ids=ids).routings
        with layer.watched(random_routing(layer, "rule", torch.Generator().manual_seed(0))):
            during = model(input_ids=ids).routings
        after = model(input_ids=ids).routings
    for one, two in zip(before, after, strict=True):
        assert torch.equal(one.experts, two.experts)
    assert torch.equal(before[0].experts, during[0].experts)
    changed = (before[1].experts != during[1].experts).any(dim=1).double().mean()
    assert changed > 0.8
    assert (
        during[1].load.tolist() == torch.bincount(during[1].experts.flatten(), minlength=6).tolist()
    )
    assert during[1].experts.dtype == torch.int32


def test_a_masked_router_draws_only_what_it_may():
    model = our_model(router="softmax")
    router = model.model.layers[0].router
    mask = torch.tensor([True, False, True, True, False, True], device=devices.current())
    router.register_forward_pre_hook(lambda module, args: (*args, mask))
    layer = routed_layers(model)[0]
    seen = []
    draw = random_routing(layer, "rule", torch.Generator().manual_seed(0))

    def use(choice):
        seen.append(draw(choice)[1])
        return draw(choice)

    with torch.no_grad(), layer.watched(use):
        model(input_ids=next(real_text()()))
    assert seen[0].unique().tolist() == [1, 4]


# --- the command


@pytest.fixture
def text(tmp_path):
    folder = tmp_path / "text"
    folder.mkdir()
    shutil.copy(STDLIB / "json" / "decoder.py", folder)
    shutil.copy(STDLIB / "json" / "encoder.py", folder)
    return folder


def test_probe_a_run(tmp_path, capsys, text):
    out = tmp_path / "run"
    sizes = ["--d-model", "32", "--d-ff", "16", "--layers", "2", "--heads", "2", "--pool-size", "4"]
    sizes += ["--seq-len", "32", "--batch-size", "4", "--steps", "2"]
    sizes += ["--device", devices.current().type]
    assert cli.main(["train", *sizes, "--data", str(text), "--out", str(out)]) == 0
    capsys.readouterr()
    files = ["--json", tmp_path / "results" / "p.json", "--plot", tmp_path / "results" / "p.png"]
    checkpoint = latest_checkpoint(out / "checkpoints")
    output = on_device(capsys, "probe", checkpoint, "--tokens", "500", "--seeds", "2", *files)
    assert "over 496 tokens (text held out in training)" in output
    assert "random layer" in output
    found = json.loads((tmp_path / "results" / "p.json").read_text())
    assert [layer["layer"] for layer in found["layers"]] == [0, 1]
    assert [len(layer["loss"]) for layer in found["layers"]] == [2, 2]
    for layer in found["layers"]:
        mean = statistics.fmean(layer["loss"])
        assert layer["loss_increase"] == pytest.approx(mean - found["loss"], abs=1e-12)
        assert f"{layer['loss_increase']:+.4f} ± {layer['loss_spread']:.4f}"[1:] in output
    assert (tmp_path / "results" / "p.png").read_bytes().startswith(b"\x89PNG")

    error = refused_on_device(capsys, "probe", out, "--layer", "5")
    assert "--layer must be one of the MoE layers 0, 1, got 5" in error
    assert "--weights" in refused_on_device(capsys, "probe", out, "--weights", "none")
    assert "--seeds" in refused_on_device(capsys, "probe", out, "--seeds", "0")
    error = refused_on_device(capsys, "probe", out, "--json", tmp_path)
    assert "it is a folder" in error
    error = refused_on_device(capsys, "probe", out, "--data", tmp_path / "nothing")
    assert "nothing does not exist" in error


@pytest.mark.parametrize("family", ["mixtral", "olmoe"])
def test_probe_a_hugging_face_folder(tmp_path, capsys, text, family):
    model = hugging_face(family)
    model.save_pretrained(tmp_path / "model")
    ByteTokenizer().hugging_face().save_pretrained(tmp_path / "model")
    options = ["--data", text, "--tokens", "630", "--seq-len", "64", "--seeds", "1", "--layer", "1"]
    on_device(capsys, "probe", tmp_path / "model", *options, "--json", tmp_path / "p.json")
    found = json.loads((tmp_path / "p.json").read_text())
    assert [layer["layer"] for layer in found["layers"]] == [1]
    assert found["tokens"] == 630
    ids = torch.tensor(list((text / "decoder.py").read_bytes()[:631]))
    rows = torch.stack([ids[start : start + 64] for start in range(0, 630, 63)]).to(model.device)
    loss = model(input_ids=rows, labels=rows).loss.item()
    assert found["loss"] == pytest.approx(loss, abs=1e-5)


@pytest.mark.any_device
def test_unknown_weights_and_no_seed_are_refused():
    model = our_model()
    with pytest.raises(InputError, match="--weights must be one of rule, kept, got same"):
        run_probe(model, real_text(), weights="same")
    with pytest.raises(InputError, match="--seeds must be at least 1, got 0"):
        run_probe(model, real_text(), seeds=())
