# SPDX-License-Identifier: Apache-2.0
"""Weights and moments that are not finite end a run in the step that made them."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from unipool.errors import TrainingError
from unipool.files import latest_checkpoint
from unipool.training.run import run_training
from unipool.training.trainer import PoolTrainer

pytest.importorskip("transformers")
pytestmark = pytest.mark.usefixtures("small_scale")


def at_step(monkeypatch, step, change):
    """Let `change` happen to the trainer's gradients or state just before optimizer step `step`."""
    usual = PoolTrainer.create_optimizer

    def create_optimizer(self, *args, **kwargs):
        optimizer = usual(self, *args, **kwargs)

        def before(*_):
            if self.state.global_step == step - 1:
                change(optimizer)

        optimizer.register_step_pre_hook(before)
        return optimizer

    monkeypatch.setattr(PoolTrainer, "create_optimizer", create_optimizer)


def of_matrix(optimizer):
    return optimizer.param_groups[0]["params"][0]


def overflowing_gradient(optimizer):
    of_matrix(optimizer).grad.view(-1)[0] = 1e25  # finite, and its square is not


def poisoned(name, value):
    def change(optimizer):
        optimizer.state[of_matrix(optimizer)][name].view(-1)[-1] = value

    return change


def rate(optimizer):
    for group in optimizer.param_groups:
        group["lr"] = 1e39 if isinstance(group["lr"], float) else group["lr"] * math.inf


@pytest.mark.parametrize(
    ("change", "names"),
    [
        (overflowing_gradient, "exp_avg_sq"),
        (poisoned("exp_avg_sq", math.inf), "exp_avg_sq"),
        (poisoned("exp_avg_sq", math.nan), "weight and exp_avg_sq"),
        (poisoned("exp_avg", math.nan), "weight and exp_avg"),
        (poisoned("exp_avg", -math.inf), "weight and exp_avg"),
        (rate, "weight"),
    ],
    ids=["overflow", "inf", "nan", "first nan", "first inf", "rate"],
)
def test_it_is_noticed_in_the_step(config, monkeypatch, change, names):
    at_step(monkeypatch, 6, change)
    with pytest.raises(TrainingError, match=rf"^step 6: {names} of AdamW not finite") as caught:
        run_training(replace(config, save_every=1, log_every=1))
    newest = latest_checkpoint(Path(config.out, "checkpoints"))
    assert newest.name == "step-5", "no checkpoint of the step was written"
    assert str(caught.value).endswith(f"last complete checkpoint: {newest}")
    saved = torch.load(newest / "optimizer.pt", weights_only=True)["state"]
    assert all(torch.isfinite(value).all() for state in saved.values() for value in state.values())
    assert '"step": 6' not in Path(config.out, "metrics.jsonl").read_text()


def test_what_a_checkpoint_brings_is_noticed_in_the_first_step(config, monkeypatch):
    run_training(replace(config, steps=3))
    at_step(monkeypatch, 4, poisoned("exp_avg_sq", math.inf))
    with pytest.raises(TrainingError, match="step 4: exp_avg_sq of AdamW not finite"):
        run_training(replace(config, steps=6), resume=True)
