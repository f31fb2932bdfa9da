# SPDX-License-Identifier: Apache-2.0
"""The scales of the paper, and parameter counts against models built without storage."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from unipool.models import UniPoolConfig, parameter_counts, preset, preset_names

# name: D, F, L, heads, experts of the pool, balance coefficient, dense parameters in millions
SCALES = {
    "182m": (768, 3072, 12, 12, 96, 1e-2, 182),
    "469m": (1024, 4096, 24, 16, 192, 2e-2, 470),
    "650m": (1024, 4096, 36, 16, 288, 2e-2, 652),
    "830m": (1024, 4096, 48, 16, 384, 2e-2, 835),
    "978m": (1536, 6144, 24, 16, 192, 2e-2, 978),
}
FORMS = ["dense", "vanilla", "unipool"]


def count(config) -> dict[str, int]:
    """Counts over the parameters of the model itself."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    expert = sum(size for name, size in sizes.items() if ".pools." in name)
    one = expert // (config.num_pools * config.num_experts) if expert else 0
    used = one * config.num_hidden_layers * config.num_experts_per_tok if expert else 0
    total = sum(sizes.values())
    return {"total": total, "expert": expert, "active": total - expert + used}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", [*SCALES, "tiny", "small"])
def test_parameter_counts_are_those_of_the_model(name, form):
    config = preset(name, form)
    assert parameter_counts(config) == count(config)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    "overrides",
    [
        {"tie_word_embeddings": True},
        {"attention_bias": True},
        {"head_dim": 32, "num_key_value_heads": 2},
        {"num_hidden_layers": 6, "hidden_size": 96, "num_attention_heads": 4, "vocab_size": 100},
    ],
)
def test_parameter_counts_follow_the_options(form, overrides):
    config = preset("tiny", form, **overrides)
    assert parameter_counts(config) == count(config)


def test_the_published_pools_of_469m():
    """2.588 B parameters with 192 experts, 1.782 B with 128, its 66.7 % pool."""
    billions = [parameter_counts(preset("469m", num_experts=m))["total"] / 1e9 for m in (192, 128)]
    assert [round(b, 3) for b in billions] == [2.588, 1.782]


def test_parameter_counts_of_groups_and_several_experts():
    config = preset("tiny", num_pools=2, num_experts=6, num_experts_per_tok=3, router="softmax")
    assert parameter_counts(config) == count(config)
    dense_bias = preset("tiny", "dense", mlp_bias=True)
    assert parameter_counts(dense_bias) == count(dense_bias)


@pytest.mark.parametrize("name", SCALES)
def test_scales_are_those_of_the_paper(name):
    width, ffn, layers, heads, pool, coefficient, millions = SCALES[name]
    dense, vanilla, unipool = (preset(name, form) for form in FORMS)
    for config in (dense, vanilla, unipool):
        assert (config.hidden_size, config.intermediate_size) == (width, ffn)
        assert (config.num_hidden_layers, config.num_attention_heads) == (layers, heads)
        assert config.num_key_value_heads == 4
        assert config.vocab_size == 51200
        assert config.max_position_embeddings == 1024
        assert config.rope_parameters == {"rope_type": "default", "rope_theta": 1e6}
        assert config.initializer_range == 0.01
        assert config.tie_word_embeddings is False
    assert (vanilla.num_pools, vanilla.num_experts) == (layers, 8)
    assert (vanilla.router, vanilla.balance, vanilla.balance_delay) == ("softmax", "layer", 0)
    assert (unipool.num_pools, unipool.num_experts) == (1, pool)
    assert (unipool.router, unipool.balance, unipool.balance_delay) == ("norm", "pool", 1)
    assert unipool.balance_coefficient == coefficient
    assert vanilla.num_experts_per_tok == unipool.num_experts_per_tok == 1

    counts = {form: parameter_counts(preset(name, form)) for form in FORMS}
    assert round(counts["dense"]["total"] / 1e6) == millions
    # Equal active size but for the routers, which see one logit an expert.
    for form, experts in (("vanilla", 8), ("unipool", pool)):
        routers = counts[form]["active"] - counts["dense"]["active"]
        assert routers == layers * (experts * width + (form == "unipool"))
    assert counts["unipool"]["expert"] * 8 * layers == counts["vanilla"]["expert"] * pool


def test_names_and_forms():
    assert preset_names() == (*SCALES, "tiny", "small")
    assert isinstance(preset("tiny"), UniPoolConfig)
    assert preset("tiny", "dense").model_type == "llama"


def test_overrides_replace_fields():
    config = preset("182m", "unipool", num_experts=48, balance_delay=0, rope_theta=1e4)
    assert (config.num_experts, config.balance_delay) == (48, 0)
    assert config.rope_parameters["rope_theta"] == 1e4
    assert preset("182m", "vanilla", num_hidden_layers=3).num_pools == 3
    assert preset("182m", "vanilla", num_hidden_layers=3, num_pools=1).num_pools == 1


@pytest.mark.parametrize(
    ("arguments", "overrides", "message"),
    [
        (("7b",), {}, "preset: name must be one of .*'182m'.*, got '7b'"),
        (("tiny", "moe"), {}, "preset: form must be one of .*'dense'.*, got 'moe'"),
        (("tiny",), {"num_expert": 4}, "preset: UniPoolConfig has no field num_expert"),
        (("tiny", "dense"), {"num_pools": 1}, "preset: LlamaConfig has no field num_pools"),
        (("tiny",), {"num_experts_per_tok": 17}, "num_experts_per_tok must be in"),
        (("tiny", "dense"), {"num_attention_heads": 5}, "LlamaConfig: hidden_size must be a mult"),
        (("tiny", "dense"), {"num_key_value_heads": 3}, "must be a multiple of num_key_value_hea"),
    ],
)
def test_impossible_presets_are_refused(arguments, overrides, message):
    with pytest.raises(ValueError, match=message) as caught:
        preset(*arguments, **overrides)
    assert "\n" not in str(caught.value)
