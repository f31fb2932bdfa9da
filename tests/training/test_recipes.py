# SPDX-License-Identifier: Apache-2.0
"""What a run is not told comes from its scale, for every command alike."""

import dataclasses
import re
from pathlib import Path

import pytest

pytest.importorskip("transformers")

from unipool.compare.sweep import Sweep
from unipool.configs import CompareConfig, DemoConfig
from unipool.errors import InputError
from unipool.scales import SCALES
from unipool.training.config import TrainConfig
from unipool.training.demo import demo_configs

pytestmark = pytest.mark.any_device
PAGE = Path(__file__).resolve().parents[2] / "docs" / "cli.md"


def recipe(config: TrainConfig) -> dict:
    """Those of a run's options that a recipe has, as the run uses them."""
    names = [f.name for f in dataclasses.fields(SCALES[config.scale].recipe)]
    found = {name: getattr(config, name) for name in names}
    found["init_std"] = config.model_config(320, 256).initializer_range
    return found


@pytest.mark.parametrize("scale", SCALES)
def test_a_run_follows_the_recipe(scale):
    config = TrainConfig(scale=scale)
    due = dataclasses.asdict(SCALES[scale].recipe)
    assert recipe(config) == due
    assert config.min_lr == due["lr"] / 10


@pytest.mark.parametrize("scale", ["tiny", "small", "182m"])
def test_a_sweep_follows_it_but_for_evaluations_between(scale):
    sweep = Sweep.of(CompareConfig(preset=("main",), scale=scale))
    for member in sweep.members(Path("out")):
        assert recipe(member.config) == recipe(TrainConfig(scale=scale)) | {"eval_every": 0}
        assert member.config.min_lr == member.config.lr / 10


def test_the_demo_follows_it_but_for_evaluations():
    due = recipe(TrainConfig(scale="tiny")) | {"eval_every": 0, "eval_tokens": 1 << 16}
    for config in demo_configs(DemoConfig()).values():
        assert recipe(config) == due


def test_the_published_recipe_is_the_papers():
    config = TrainConfig(scale="182m")
    assert config.batch_size * config.accumulate == 512
    assert (config.seq_len, config.steps, config.precision) == (1024, 60_000, "bf16")
    assert (config.lr, config.min_lr, config.warmup, config.clip) == (5e-4, 5e-5, 0.01, 1.0)


@pytest.mark.parametrize("field", dataclasses.fields(SCALES["tiny"].recipe), ids=lambda f: f.name)
def test_what_is_given_wins(field):
    value = "bf16" if field.name == "precision" else 7 if field.type is int else 0.125
    assert recipe(TrainConfig(**{field.name: value}))[field.name] == value


def test_what_is_given_wins_in_a_sweep():
    config = CompareConfig(preset=("main",), lr=1e-3, init_std=0.2, steps=3)
    for member in Sweep.of(config).members(Path("out")):
        run = member.config
        assert (run.lr, run.min_lr, run.init_std, run.steps) == (1e-3, 1e-4, 0.2, 3)


def test_an_unknown_scale():
    with pytest.raises(InputError, match=r"--scale must be one of 182m, .*small, got huge"):
        TrainConfig(scale="huge")


def test_the_page_has_the_recipes():
    shown = {}
    rows = re.findall(r"^\| (`\w+`(?:, `\w+`)*) \| ([0-9].*) \|$", PAGE.read_text(), re.M)
    for names, row in rows:
        shown |= dict.fromkeys(re.findall(r"`(\w+)`", names), row.split(" | "))
    assert shown == {
        name: [
            f"{r.init_std:g}",
            f"{r.seq_len}",
            f"{r.batch_size} x {r.accumulate}",
            f"{r.steps:,}",
            f"{r.lr:g}",
            f"{r.warmup:.0%}".replace("%", " %"),
            r.precision,
        ]
        for name, r in ((name, scale.recipe) for name, scale in SCALES.items())
    }
