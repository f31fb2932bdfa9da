# SPDX-License-Identifier: Apache-2.0
"""Grids and presets of `unipool compare`."""

import re

import pytest

from unipool import cli
from unipool.compare import summary
from unipool.compare.grid import Axes, Baseline, Size, Variant, grid, vanilla
from unipool.compare.presets import PRESETS, preset_variants, with_baselines
from unipool.models import parameter_counts, preset, preset_names
from unipool.report.tables import with_spread
from unipool.training.config import TrainConfig

pytest.importorskip("typer")
pytest.importorskip("transformers")
pytestmark = pytest.mark.usefixtures("small_scale")


SCALES = preset_names()


def model_config(variant: Variant, baseline: Baseline):
    return TrainConfig(**variant.options(baseline)).model_config(256, 0)


@pytest.mark.parametrize("scale", SCALES)
def test_vanilla_and_main_are_the_models_of_the_scale(scale):
    baseline = Baseline.of(scale)
    (main,) = preset_variants(["main"], baseline)
    for variant, form in ((vanilla(baseline), "vanilla"), (main, "unipool")):
        got, due = model_config(variant, baseline), preset(scale, form, vocab_size=256)
        due.eos_token_id = 0
        assert got.to_dict() == due.to_dict()


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("scale", SCALES)
def test_every_preset_can_be_built_at_every_scale_with_equal_active_sizes(scale, name):
    baseline = Baseline.of(scale)
    variants = with_baselines(preset_variants([name], baseline), baseline)
    assert len({v.name for v in variants}) == len(variants) >= 2
    for variant in variants:
        counts = parameter_counts(model_config(variant, baseline))
        reference = parameter_counts(model_config(vanilla(baseline), baseline))
        one = reference["expert"] // baseline.experts  # of the baseline's
        assert counts["expert"] == variant.pools * variant.pool_size * one // variant.granularity
        config = model_config(variant, baseline)
        assert config.num_experts_per_tok * config.intermediate_size == baseline.d_ff
        # Only routers differ: with as many rows they are equal, but for the scales of NormRouter.
        if (variant.router, variant.pool_size) == ("norm", baseline.layer_experts):
            assert counts["active"] == reference["active"] + baseline.layers


def test_presets_at_the_smallest_published_scale():
    baseline = Baseline.of("182m")

    def sizes(name):
        return [(v.pools, v.pool_size, v.granularity) for v in preset_variants([name], baseline)]

    assert sizes("sharing") == [(g, 96 // g, 1) for g in (1, 2, 3, 4, 6, 12)]
    assert sizes("pool-size") == [(1, m, 1) for m in (40, 48, 64, 80, 96)]
    assert sizes("granularity") == [(1, 96, 1), (1, 192, 2), (1, 384, 4)]
    ablation = preset_variants(["ablation"], baseline)
    assert {(v.router, v.balance) for v in ablation if v.pools == 1} == {
        ("norm", "pool"),
        ("norm", "layer"),
        ("softmax", "pool"),
        ("softmax", "layer"),
    }
    assert [(v.router, v.pool_size) for v in ablation if v.pools == 12] == [("norm", 8)]
    both = preset_variants(["main", "delay"], baseline)
    assert [v.delay for v in both] == [1, 0]  # the model that both have comes once


def test_baselines_follow_the_granularity():
    baseline = Baseline.of("tiny")
    variants = with_baselines(preset_variants(["granularity"], baseline), baseline)
    names = ["softmax-4x4-k1-layer0", "softmax-4x8-k2-layer0", "softmax-4x16-k4-layer0"]
    assert [v.name for v in variants[:3]] == names
    assert [v.options(baseline)["d_ff"] for v in variants[:3]] == [128, 64, 32]
    assert [summary.label(v, baseline) for v in variants[:3]] == [
        "vanilla",
        "vanilla-k2",
        "vanilla-k4",
    ]


def test_help_names_every_preset_and_scale(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    assert cli.main(["compare", "--help"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    for name in (*PRESETS, *SCALES):
        assert re.search(rf"\b{name}\b", text), name


@pytest.mark.parametrize(
    ("value", "std", "form", "text"),
    [
        (0.0736, 0.0274, "+.3f", "+0.074 ± 0.027"),
        (-0.0001, 0.02, "+.3f", "+0.000 ± 0.020"),
        (-0.0001, None, ".3f", "0.000"),
        (-0.0006, None, "+.3f", "-0.001"),
    ],
)
def test_spreads_have_no_sign_and_zero_no_minus(value, std, form, text):
    assert with_spread(value, std, form) == text


def test_a_grid_has_every_combination_once():
    baseline = Baseline.of("tiny")
    sizes = (Size.parse("50%"), Size.parse("8"), Size.parse("100%"))
    axes = Axes(("norm", "recurrent-norm"), (1, 2), sizes, ("pool", "none"), (0, 1))
    variants = grid(baseline, axes)
    # 8 experts are 50 % of one pool and 100 % of two; delay means nothing without a balance loss.
    assert len(variants) == 2 * (2 + 2) * 3
    assert {v.pool_size for v in variants if v.pools == 2} == {4, 8}
    chosen = next(v for v in variants if v.router == "recurrent-norm")
    config = model_config(chosen, baseline)
    assert (config.router, config.router_scoring) == ("recurrent", "norm")


def test_the_balance_coefficient_is_that_of_the_loss():
    baseline = Baseline.of("830m")
    variants = grid(baseline, Axes(balance=("pool", "layer")))
    assert [v.options(baseline)["balance_coefficient"] for v in variants] == [2e-2, 1e-2]
