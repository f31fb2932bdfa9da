# SPDX-License-Identifier: Apache-2.0
"""UniPoolForCausalLM on disk and in other dtypes; configurations that cannot be."""

import json
import os
import subprocess
import sys

import devices
import pytest
import torch
from safetensors.torch import load_file, save_file
from small_models import (
    FORMS,
    RECURRENT,
    SHAPE,
    VANILLA,
    assert_all_equal,
    make_ids,
    make_model,
    states,
)
from transformers import AutoModelForCausalLM

from unipool.models import (
    UniPoolConfig,
    UniPoolForCausalLM,
    UniPoolModel,
    preset,
)

pytestmark = pytest.mark.usefixtures("device")


def load(path, kind=UniPoolForCausalLM, **options):
    return kind.from_pretrained(path, **options).to(devices.current())


def trained(**overrides) -> UniPoolForCausalLM:
    model = make_model(**overrides).train()
    with torch.no_grad():
        for layer in model.model.layers:
            if getattr(layer.router, "scale", None) is not None:
                layer.router.scale.fill_(1.25)
    model(make_ids(2, 6))
    assert all(fraction.sum() > 0.5 for fraction in states(model))
    return model


@pytest.mark.parametrize("shard", ["5GB", "50KB"])
@pytest.mark.parametrize("form", FORMS)
def test_saved_model_is_one_copy_and_loads_bit_equal(tmp_path, form, shard):
    model = trained(**FORMS[form])
    model.save_pretrained(tmp_path, max_shard_size=shard)
    files = list(tmp_path.glob("*.safetensors"))
    assert (len(files) > 1) == (shard == "50KB")
    loaded, info = UniPoolForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    loaded = loaded.to(devices.current())
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    expected, actual = model.state_dict(), loaded.state_dict()
    assert actual.keys() == expected.keys()
    assert all(torch.equal(actual[name], tensor) for name, tensor in expected.items())
    unique = sum(tensor.nbytes for tensor in expected.values())
    on_disk = sum(file.stat().st_size for file in files)
    headers = sum(int.from_bytes(file.read_bytes()[:8], "little") + 8 for file in files)
    assert on_disk - headers == unique
    pools = [name for name in expected if name.endswith("gate_up_proj")]
    assert len(pools) == model.config.num_pools
    # What is in no state dict: the calibration, and the rotary frequencies.
    ids = make_ids(2, 6, seed=3)
    loaded.train()
    assert torch.equal(loaded(ids, labels=ids).loss, model(ids, labels=ids).loss)


@pytest.mark.any_device
def test_bytes_on_disk_stay_within_a_hundredth_of_the_parameters(tmp_path):
    model = UniPoolForCausalLM(preset("tiny"))
    model.save_pretrained(tmp_path)
    on_disk = sum(file.stat().st_size for file in tmp_path.glob("*.safetensors"))
    unique = sum(p.nbytes for p in {id(p): p for p in model.parameters()}.values())
    assert unique <= on_disk <= 1.01 * unique


def test_auto_classes_load_in_a_fresh_process(tmp_path):
    model = trained().eval()
    model.save_pretrained(tmp_path)
    program = (
        "import json, sys, torch, unipool.models\n"
        "from transformers import AutoConfig, AutoModel, AutoModelForCausalLM\n"
        "path, ids = sys.argv[1], torch.tensor(json.loads(sys.argv[2]))\n"
        "model = AutoModelForCausalLM.from_pretrained(path).to(sys.argv[3])\n"
        "names = [type(model), type(AutoModel.from_pretrained(path)), type(model.config)]\n"
        "assert type(AutoConfig.from_pretrained(path)) is type(model.config)\n"
        "with torch.no_grad():\n"
        "    logits = model(ids.to(model.device)).logits\n"
        "print(json.dumps([[n.__name__ for n in names], logits.flatten().tolist()]))\n"
    )
    ids = make_ids(1, 4)
    environment = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    result = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path), json.dumps(ids.tolist()), str(ids.device)],
        capture_output=True,
        text=True,
        env=environment,
    )
    assert result.returncode == 0, result.stderr
    names, logits = json.loads(result.stdout.splitlines()[-1])
    assert names == ["UniPoolForCausalLM", "UniPoolModel", "UniPoolConfig"]
    with torch.no_grad():
        expected = model(ids).logits.flatten().cpu()
    torch.testing.assert_close(torch.tensor(logits), expected, rtol=1e-5, atol=1e-5)


def test_backbone_loads_from_the_saved_language_model(tmp_path):
    model = trained().eval()
    model.save_pretrained(tmp_path)
    backbone = load(tmp_path, UniPoolModel).eval()
    ids = make_ids(2, 5)
    expected = model(ids, output_hidden_states=True).hidden_states[-1]
    assert torch.equal(backbone(ids).last_hidden_state, expected)


def test_tied_embeddings_are_saved_once(tmp_path):
    model = trained(tie_word_embeddings=True)
    model.save_pretrained(tmp_path)
    loaded = load(tmp_path, AutoModelForCausalLM)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert torch.equal(loaded.lm_head.weight, model.lm_head.weight)
    on_disk = sum(file.stat().st_size for file in tmp_path.glob("*.safetensors"))
    assert on_disk <= 1.1 * sum(p.nbytes for p in model.parameters())


def test_bfloat16_keeps_router_scale_and_balance_state_in_float32(tmp_path):
    model = trained()
    model.save_pretrained(tmp_path)
    loaded = load(tmp_path, dtype=torch.bfloat16).train()
    wide = {n for n, t in loaded.state_dict().items() if t.dtype == torch.float32}
    assert wide == {n for n in loaded.state_dict() if "router.scale" in n or "balancers" in n}
    assert_all_equal(states(loaded), states(model))
    ids = make_ids(2, 6)
    output, expected = loaded(ids, labels=ids), model(ids, labels=ids)
    assert output.logits.dtype == torch.bfloat16
    assert abs(output.loss - expected.loss) < 0.05 * expected.loss
    output.loss.backward()
    assert all(torch.isfinite(p.grad).all() for p in loaded.parameters())


def test_dtype_conversions_keep_the_model_working():
    model = trained()
    ids = make_ids(2, 6)
    expected = model(ids, labels=ids).lm_loss
    for dtype in (torch.bfloat16, torch.float32, devices.widest_float()):
        model.to(dtype)
        model.zero_grad()
        output = model(ids, labels=ids)
        assert abs(output.lm_loss - expected) < 0.05 * expected
        output.loss.backward()
        assert all(p.grad is not None and p.grad.dtype == p.dtype for p in model.parameters())


@pytest.mark.any_device
def test_initialization_has_the_configured_spread():
    model = UniPoolForCausalLM(preset("tiny", initializer_range=0.03))
    for name, parameter in model.named_parameters():
        if "norm" in name or "scale" in name:
            assert (parameter == 1).all(), name
        else:
            assert parameter.std().item() == pytest.approx(0.03, rel=0.1), name
            assert parameter.mean().abs() < 0.003, name
    assert all((fraction == 0).all() for fraction in states(model))


# --- configuration ---


@pytest.mark.any_device
@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"num_experts": 0}, "num_experts must be a positive integer, got 0"),
        ({"num_experts": "8"}, "num_experts must be a positive integer, got '8'"),
        ({"hidden_size": 31.5}, "hidden_size must be a positive integer, got 31.5"),
        ({"num_experts_per_tok": 9}, r"num_experts_per_tok must be in \[1, 8\].*, got 9"),
        ({"num_experts": 64, "num_experts_per_tok": 17}, r"must be in \[1, 16\].*, got 17"),
        ({"num_pools": 5}, r"num_pools must be in \[1, num_hidden_layers=4\], got 5"),
        ({"num_pools": 0}, "num_pools must be a positive integer, got 0"),
        ({"router": "hash"}, "router must be one of .*'norm', 'softmax'.*, got 'hash'"),
        ({"balance": "expert"}, "balance must be one of .*, got 'expert'"),
        ({"balance_delay": 2}, "balance_delay must be 0 or 1, got 2"),
        ({"balance_coefficient": float("nan")}, "balance_coefficient must be a finite .* got nan"),
        ({"balance_coefficient": -1.0}, "balance_coefficient must be a finite .* got -1.0"),
        ({"norm_topk_prob": True}, "norm_topk_prob must be False unless router"),
        (
            RECURRENT | {"router_scoring": "norm", "norm_topk_prob": True},
            "norm_topk_prob must be False unless .*, got router='recurrent', router_scoring='norm'",
        ),
        (RECURRENT | {"router_state_size": 0}, "router_state_size must be a positive integer"),
        (RECURRENT | {"router_state_size": 1.5}, "router_state_size must be .*, got 1.5"),
        (RECURRENT | {"router_scoring": "relu"}, "router_scoring must be one of .*, got 'relu'"),
        ({"router_state_size": 8}, 'router_state_size must be None unless .*"recurrent", got 8'),
        ({"router_scoring": "norm"}, "router_scoring must be None unless .*, got 'norm'"),
        ({"router": "recurrent", "hidden_size": "32", "head_dim": 8}, "hidden_size must be a pos"),
        (
            {"norm_topk_prob": True, "router": "softmax", "num_experts_per_tok": 1},
            "norm_topk_prob must be False with num_experts_per_tok=1",
        ),
        ({"num_attention_heads": 5}, "hidden_size must be a multiple of num_attention_heads=5"),
        ({"num_key_value_heads": 3}, "must be a multiple of num_key_value_heads=3, got 4"),
        ({"hidden_size": 12}, "head_dim must be even for RoPE, got 3"),
        ({"hidden_act": "gelu"}, 'hidden_act must be "silu"'),
        ({"initializer_range": 0}, "initializer_range must be a finite number"),
        ({"rope_theta": -1.0}, "rope_theta must be a finite number .*, got -1.0"),
        ({"rope_parameters": 3}, "rope_parameters must be a dict, got 3"),
        ({"rope_parameters": {"rope_type": "spiral"}}, "rope_type must be one of .* 'spiral'"),
        ({"rope_parameters": {"rope_type": "linear"}}, "rope_parameters: .*'factor'"),
        ({"pad_token_id": 64}, r"pad_token_id must be in \[0, vocab_size=64\), got 64"),
        ({"format_version": 2}, r"format_version must be in \[1, 1\] .*newer.*, got 2"),
    ],
)
def test_impossible_configuration_is_one_clear_line(values, message):
    with pytest.raises(ValueError, match=message) as caught:
        UniPoolConfig(**(SHAPE | values))
    assert str(caught.value).startswith("UniPoolConfig: ")
    assert "\n" not in str(caught.value)


@pytest.mark.any_device
def test_configuration_changed_afterwards_is_checked_again(tmp_path):
    config = UniPoolConfig(**SHAPE)
    config.num_pools = 9
    with pytest.raises(ValueError, match="num_pools must be in"):
        UniPoolModel(config)
    with pytest.raises(ValueError, match="num_pools must be in"):
        config.save_pretrained(tmp_path)


@pytest.mark.any_device
def test_configuration_survives_the_file(tmp_path):
    config = UniPoolConfig(**(SHAPE | VANILLA), rope_theta=5e4)
    config.save_pretrained(tmp_path)
    loaded = UniPoolConfig.from_pretrained(tmp_path)
    assert loaded.to_dict() == config.to_dict()
    assert loaded.rope_parameters == {"rope_type": "default", "rope_theta": 5e4}
    assert UniPoolConfig(**SHAPE).rope_parameters["rope_theta"] == 1e6
    newer = json.loads((tmp_path / "config.json").read_text()) | {"format_version": 7}
    (tmp_path / "config.json").write_text(json.dumps(newer))
    with pytest.raises(ValueError, match="newer UniPool"):
        UniPoolConfig.from_pretrained(tmp_path)


def test_router_scales_saved_without_dimensions_load(tmp_path):
    model = trained()
    model.save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    saved = {
        n: t.reshape(()) if n.endswith("router.scale") else t for n, t in load_file(path).items()
    }
    save_file(saved, path, {"format": "pt"})
    loaded, found = UniPoolForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(found.values()), found
    assert [layer.router.scale.tolist() for layer in loaded.model.layers] == [[1.25]] * 4
    loaded.save_pretrained(tmp_path / "again")
    again = load_file(tmp_path / "again" / "model.safetensors")
    assert {t.shape for n, t in again.items() if n.endswith("router.scale")} == {(1,)}
