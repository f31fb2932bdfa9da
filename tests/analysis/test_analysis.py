# SPDX-License-Identifier: Apache-2.0
"""What `unipool analyze` collects and reports."""

import json
import re
import shutil

import devices
import numpy as np
import pytest
import torch
from commands import on_device, refused_on_device
from plain_metrics import plain_entropy, plain_gini, plain_information, plain_jaccard
from transformers import (
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    OlmoeConfig,
    OlmoeForCausalLM,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
)

from unipool import cli
from unipool.analysis import metrics
from unipool.analysis.collect import collect, routed_layers, select_layers
from unipool.analysis.summary import analyze
from unipool.data.tokenizer import ByteTokenizer
from unipool.errors import InputError
from unipool.files import MANIFEST, latest_checkpoint
from unipool.models import UniPoolForCausalLM, preset

pytest.importorskip("typer")
pytest.importorskip("transformers")
pytestmark = pytest.mark.usefixtures("small_scale")


@pytest.fixture(scope="module")
def run(tmp_path_factory, text):
    """A run of `unipool train` with one checkpoint."""
    out = tmp_path_factory.mktemp("run") / "run"
    arguments = ["--d-model", "32", "--d-ff", "16", "--layers", "3", "--heads", "2"]
    arguments += ["--pool-size", "6", "--top-k", "2", "--num-pools", "2", "--seq-len", "32"]
    arguments += ["--batch-size", "4", "--steps", "2", "--device", "cpu", "--eval-tokens", "64"]
    assert cli.main(["train", *arguments, "--data", str(text), "--out", str(out)]) == 0
    return out


HF = {"vocab_size": 320, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 3}
HF |= {"num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 64}


def hugging_face(family):
    torch.manual_seed(0)
    if family == "mixtral":
        model = MixtralForCausalLM(MixtralConfig(**HF, num_local_experts=6))
    elif family == "olmoe":
        model = OlmoeForCausalLM(OlmoeConfig(**HF, num_experts=6, num_experts_per_tok=2))
    else:  # layer 1 has an ordinary MLP
        sizes = {"moe_intermediate_size": 8, "shared_expert_intermediate_size": 8}
        config = Qwen2MoeConfig(
            **HF, **sizes, num_experts=6, num_experts_per_tok=2, mlp_only_layers=[1]
        )
        model = Qwen2MoeForCausalLM(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("gate.weight"):
                parameter.normal_()
    return model.to(devices.current()).eval()


def dense(**sizes):
    return LlamaForCausalLM(preset("tiny", "dense", num_hidden_layers=1, **sizes))


@pytest.mark.parametrize(
    ("router", "options"),
    [
        ("norm", {}),
        ("softmax", {"num_experts_per_tok": 2, "norm_topk_prob": True}),
        ("recurrent", {"router_scoring": "norm"}),
        ("recurrent", {"num_experts_per_tok": 2}),
    ],
)
def test_our_routings_are_collected(router, options, device):
    config = preset("tiny", router=router, num_hidden_layers=3, initializer_range=0.5, **options)
    model = UniPoolForCausalLM(config).to(device).eval()
    batches = [torch.randint(256, shape, device=device) for shape in ((2, 16), (1, 16))]
    layers = routed_layers(model)
    found = collect(model, layers, batches)
    with torch.no_grad():
        outputs = [model(input_ids=ids, use_cache=False) for ids in batches]
    for index in range(3):
        expected = torch.cat([output.routings[index].experts for output in outputs])
        assert torch.equal(found.experts[index].cpu(), expected.cpu())
        assert 0 < found.gate_entropy[index] < 4
    assert not any(layer.router._forward_hooks for layer in layers)


def test_gate_entropy_of_a_norm_router_leaves_silent_tokens_out():
    model = UniPoolForCausalLM(preset("tiny", num_hidden_layers=1, num_experts=3)).eval()
    router = model.model.layers[0].router
    rows = torch.tensor([[3.0, 4.0, 0.0], [1.0, 1.0, 1.0], [-1.0, -2.0, -3.0], [5.0, 0.0, -1.0]])
    router.logits = lambda x: rows
    found = collect(model, routed_layers(model), [torch.randint(256, (1, 4))])
    expected = (plain_entropy([3, 4]) + plain_entropy([1, 1, 1]) + 0.0) / 3
    assert found.gate_entropy == pytest.approx([expected], abs=1e-6)
    assert found.silent == [0.25]
    assert found.experts[0].flatten().tolist() == [1, 0, -1, 0]
    assert found.chosen[0].flatten().tolist() == [1, 0, -1, 0]


@pytest.mark.parametrize("family", ["mixtral", "olmoe", "qwen"])
def test_hugging_face_routings_are_collected(family, device):
    model = hugging_face(family)
    ids = torch.randint(320, (2, 16), device=device)
    layers = routed_layers(model)
    assert [layer.index for layer in layers] == ([0, 2] if family == "qwen" else [0, 1, 2])
    assert {(layer.num_experts, layer.top_k) for layer in layers} == {(6, 2)}
    assert len({layer.pool for layer in layers}) == len(layers)
    found = collect(model, layers, [ids])
    with torch.no_grad():
        output = model(input_ids=ids, output_router_logits=True, use_cache=False)
    logits = [entry for entry in output.router_logits if entry is not None]
    for position in range(len(layers)):
        gates = torch.softmax(logits[position].double().cpu(), dim=1)
        assert torch.equal(found.experts[position].long().cpu(), gates.topk(2, dim=1).indices)
        mean = sum(plain_entropy(row) for row in gates.tolist()) / len(gates)
        assert found.gate_entropy[position] == pytest.approx(mean, abs=1e-5)
    loss = model(input_ids=ids, labels=ids, use_cache=False).loss.item()
    assert found.score.loss == pytest.approx(loss, abs=1e-5)


def test_models_that_cannot_be_read_are_refused():
    with pytest.raises(InputError, match="LlamaForCausalLM has no MoE layer to look at; needs"):
        routed_layers(dense())
    layers = routed_layers(hugging_face("qwen"))
    with pytest.raises(InputError, match="--layer must be one of the MoE layers 0, 2, got 1"):
        select_layers(layers, [1])
    assert [layer.index for layer in select_layers(layers, [2, 0, 2])] == [2, 0]
    sizes = {"n_routed_experts": 8, "n_group": 1, "topk_group": 1, "num_experts_per_tok": 2}
    sizes |= {"moe_intermediate_size": 8, "first_k_dense_replace": 0}
    model = DeepseekV3ForCausalLM(DeepseekV3Config(**HF, **sizes)).eval()
    with pytest.raises(InputError, match=r"needs a UniPool model or a Hugging Face MoE model"):
        collect(model, routed_layers(model), [torch.randint(320, (1, 4))])


def test_a_router_with_another_rule_is_refused():
    model = hugging_face("olmoe")
    gate = model.model.layers[1].mlp.gate
    handle = gate.register_forward_hook(lambda m, a, out: (out[0], out[1].sigmoid(), out[2]))
    message = "layer 1: the weights of OlmoeTopKRouter are not those of a softmax router"
    with pytest.raises(InputError, match=message):
        collect(model, routed_layers(model), [torch.randint(320, (1, 4))])
    handle.remove()


def test_analysis_of_a_shared_pool_adds_up(device):
    torch.manual_seed(0)
    config = preset("tiny", num_hidden_layers=4, num_pools=2, num_experts=6, initializer_range=0.5)
    model = UniPoolForCausalLM(config).to(device).eval()
    with torch.no_grad():
        model.model.layers[1].router.scale.fill_(1.5)
    ids = torch.randint(256, (2, 32), device=device)
    found = analyze(model, [ids])
    with torch.no_grad():
        load = model(input_ids=ids).load.cpu()
    assert found.arrays["load"].tolist() == load.tolist()
    assert [row["scale"] for row in found.numbers["layers"]] == [1.0, 1.5, 1.0, 1.0]
    assert [row["layers"] for row in found.numbers["pools"]] == [[0, 1], [2, 3]]
    for row, counts in zip(found.numbers["layers"], load.tolist(), strict=True):
        assert row["load_entropy"] == pytest.approx(plain_entropy(counts))
        assert row["load_effective"] == pytest.approx(2 ** plain_entropy(counts))
        assert row["gini"] == pytest.approx(plain_gini(counts))
        assert row["dead"] == counts.count(0)
    for row in found.numbers["pools"]:
        counts = load[row["layers"]].sum(0).tolist()
        assert row["gini"] == pytest.approx(plain_gini(counts))
        assert row["dead_experts"] == [e for e, n in enumerate(counts) if n == 0]
    pool = model.model.pools[1]
    similarity = metrics.weight_similarity(pool.gate_up_proj, pool.down_proj)
    np.testing.assert_allclose(found.arrays["similarity_1"], similarity.cpu())
    assert np.isfinite(found.arrays["jaccard"]).sum() == 4  # two pairs of layers, each way
    chosen = collect(model, routed_layers(model), [ids]).chosen
    information = plain_information(chosen[1], chosen[3])
    assert found.arrays["information"][1, 3] == pytest.approx(information)
    assert found.arrays["jaccard"][1, 0] == pytest.approx(plain_jaccard(chosen[0], chosen[1]))
    json.dumps(found.numbers, allow_nan=False)


def test_layers_that_see_a_part_of_the_pool(device):
    """Their routers count from zero; the analysis speaks of the pool's ids."""
    seen = [[0, 2, 4], [5, 1, 2], [4, 5]]
    config = preset("tiny", num_hidden_layers=3, num_experts=6, layer_experts=seen)
    config.initializer_range = 0.5
    model = UniPoolForCausalLM(config).to(device).eval()
    ids = torch.randint(256, (2, 32), device=device)
    found = analyze(model, [ids])
    with torch.no_grad():
        load = model(input_ids=ids).load
    for index, row in enumerate(found.numbers["layers"]):
        counts = load[index][seen[index]].tolist()
        assert row["experts"] == len(seen[index])
        assert row["gini"] == pytest.approx(plain_gini(counts))
        assert row["dead"] == counts.count(0)
        hidden = [e for e in range(6) if e not in seen[index]]
        assert found.arrays["load"][index][hidden].tolist() == [-1] * len(hidden)
        assert found.arrays["load"][index][seen[index]].tolist() == counts
    assert 3 in found.numbers["pools"][0]["dead_experts"]


def test_analyze_a_run(tmp_path, capsys, run, device):
    output = on_device(capsys, "analyze", run, "--out", tmp_path / "a", "--tokens", "600")
    assert f"report: {tmp_path / 'a' / 'report.html'}" in output
    files = {path.name for path in (tmp_path / "a").iterdir()}
    pictures = {"load", "entropy", "information", "jaccard", "similarity", "scale"}
    assert files == {"report.html", "analysis.json", "analysis.npz"} | {
        f"{p}.png" for p in pictures
    }
    page = (tmp_path / "a" / "report.html").read_text()
    assert page.count("data:image/png;base64,") == len(pictures)
    assert not re.findall(r'(?:src|href)="(?!data:)', page)  # nothing beside it is needed
    numbers = json.loads((tmp_path / "a" / "analysis.json").read_text())
    arrays = np.load(tmp_path / "a" / "analysis.npz")
    assert numbers["text"] == "text held out in training"
    slots = 2 * numbers["tokens"]
    assert all(slots / 2 < row <= slots for row in arrays["load"].sum(axis=1))
    assert [plain_gini(row) for row in arrays["load"].tolist()] == pytest.approx(
        [row["gini"] for row in numbers["layers"]]
    )
    checkpoint = latest_checkpoint(run / "checkpoints")  # the same weights
    on_device(capsys, "analyze", checkpoint, "--out", tmp_path / "b", "--tokens", "600")
    again = json.loads((tmp_path / "b" / "analysis.json").read_text())
    assert again["layers"] == numbers["layers"]
    assert again["loss"] == numbers["loss"]


@pytest.mark.parametrize("family", ["mixtral", "olmoe"])
def test_analyze_a_hugging_face_folder(tmp_path, capsys, text, family, device):
    model = hugging_face(family)
    model.save_pretrained(tmp_path / "model")
    ByteTokenizer().hugging_face().save_pretrained(tmp_path / "model")
    error = refused_on_device(capsys, "analyze", tmp_path / "model", "--out", tmp_path / "a")
    assert "--data is needed" in error
    assert not (tmp_path / "a").exists()
    options = ["--data", text, "--tokens", "400", "--seq-len", "32", "--out", tmp_path / "a"]
    on_device(capsys, "analyze", tmp_path / "model", *options)
    numbers = json.loads((tmp_path / "a" / "analysis.json").read_text())
    assert numbers["model"] == type(model).__name__
    assert numbers["cross_layer"]["jaccard"] is None  # every layer has experts of its own
    assert numbers["cross_layer"]["information"] > 0
    assert not (tmp_path / "a" / "scale.png").exists()


def test_bad_checkpoints_are_one_line(tmp_path, capsys, run, text):
    out = ["--out", tmp_path / "a"]
    error = refused_on_device(capsys, "analyze", tmp_path / "nothing", *out)
    assert "give a run folder, a complete checkpoint" in error
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    (copy / "model" / MANIFEST).unlink()
    error = refused_on_device(capsys, "analyze", copy, *out)
    assert f"{copy / 'model'} is incomplete: {MANIFEST} is missing; give" in error
    step = latest_checkpoint(copy / "checkpoints")
    (step / MANIFEST).unlink()
    assert f"{MANIFEST} is missing" in refused_on_device(capsys, "probe", step)
    for size, message in ((256, "embeddings of the ids below 256"), (320, "has no MoE layer")):
        dense(vocab_size=size).save_pretrained(tmp_path / "dense")
        ByteTokenizer().hugging_face().save_pretrained(tmp_path / "dense")
        assert message in refused_on_device(capsys, "probe", tmp_path / "dense", "--data", text)
    blocker = tmp_path / "file"
    blocker.write_text("")
    error = refused_on_device(capsys, "analyze", run, "--out", blocker / "a")
    assert "is not a folder that can be written to" in error
    error = refused_on_device(capsys, "analyze", run, "--seq-len", "99999", *out)
    assert "--seq-len must be in [2, 1024], got 99999" in error
    assert not (tmp_path / "a").exists()


def test_a_changed_text_is_noticed(tmp_path, capsys, run, text):
    copy, changed = tmp_path / "run", tmp_path / "text"
    shutil.copytree(run, copy)
    shutil.copytree(text, changed)
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"data": [str(changed)]}))
    (changed / "decoder.py").write_text("something else\n")
    error = refused_on_device(capsys, "analyze", copy, "--out", tmp_path / "a")
    assert "has changed since" in error
