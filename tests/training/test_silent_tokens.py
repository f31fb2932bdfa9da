# SPDX-License-Identifier: Apache-2.0
"""Tokens that no expert got: counted over a logging window, also over one that a checkpoint cuts;
and a warning where they are nearly all of a layer's."""

from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console
from runs import rows, stop_after

from unipool.training.callbacks import SilenceWarning
from unipool.training.metrics import read_metrics
from unipool.training.run import run_training
from unipool.training.trainer import PoolTrainer

pytest.importorskip("transformers")
pytestmark = pytest.mark.usefixtures("small_scale")


@pytest.fixture
def half_silent(config):
    """One expert: about half the tokens score below zero for it."""
    return replace(config, pool_size=1)


@pytest.fixture
def routed(monkeypatch):
    """The routings of each micro-batch that is trained on."""
    seen = []
    usual = PoolTrainer.compute_loss

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        loss, outputs = usual(self, model, inputs, True, num_items_in_batch)
        seen.append(getattr(outputs, "routings", None))
        return (loss, outputs) if return_outputs else loss

    monkeypatch.setattr(PoolTrainer, "compute_loss", compute_loss)
    return seen


def logged(config):
    found = read_metrics(Path(config.out, "metrics.jsonl"))
    return [row["silent_fraction"] for row in found if "lm_loss" in row]


def test_rows_have_the_part_of_each_window(half_silent, routed):
    config = replace(half_silent, batch_size=2, accumulate=2)
    run_training(config)
    due = []
    for first in range(0, 24, 8):  # log_every is 4 steps of two micro-batches
        slots = [one.load.sum().item() for batch in routed[first : first + 8] for one in batch]
        due.append(1 - sum(slots) / (len(slots) * 2 * 32))
    assert logged(config) == pytest.approx(due)
    assert all(0 < part < 1 for part in logged(config))


@pytest.mark.any_device
def test_a_softmax_router_leaves_none_and_a_dense_model_has_no_figure(config):
    run_training(replace(config, form="vanilla", steps=4))
    assert logged(config) == [0.0]
    options = {"form": "dense", "pool_size": None, "out": config.out + "-dense", "steps": 4}
    run_training(replace(config, **options))
    assert all("silent_fraction" not in row for row in rows(replace(config, **options)))


@pytest.mark.parametrize("lost", [False, True])
def test_a_window_that_a_checkpoint_cuts_is_taken_up(half_silent, monkeypatch, tmp_path, lost):
    whole = replace(half_silent, out=str(tmp_path / "whole"))
    run_training(whole)
    with monkeypatch.context() as patch:
        stop_after(patch, 5)
        run_training(half_silent)
    if lost:  # the comparison notices
        usual = PoolTrainer.restore_window

        def without(self):
            usual(self)
            self._silent, self._routed = None, 0

        monkeypatch.setattr(PoolTrainer, "restore_window", without)
    run_training(half_silent, resume=True)
    assert (rows(half_silent) == rows(whole)) != lost


def test_a_layer_that_stays_silent_is_named_once(config, capsys):
    # So small that products of two underflow: every score is zero.
    config = replace(config, init_std=1e-30, lr=1e-30, min_lr=0.0, log_every=1, steps=6)
    run_training(config, console=Console(width=500))
    printed = capsys.readouterr().out
    assert logged(config) == [1.0] * 6
    assert printed.count("warning") == 1
    assert "warning: step 3: in layers 0, 1 no expert scores above zero for 100%" in printed
    assert "greater --init-std (here 1e-30) or a lower --lr" in printed
    assert "100% silent" in printed


@pytest.mark.any_device
def test_a_layer_that_comes_back_is_not(capsys):
    windows = [[0.95, 0.1], [0.95, 0.95], [0.2, 0.95], [0.95, 0.2], [0.95, 0.2]]
    state = type("State", (), {"global_step": 7})
    feed = iter(windows)
    warning = SilenceWarning(Console(width=500), lambda: next(feed), 0.05)
    for _ in windows:
        warning.on_log(None, state, None, logs={"silent_fraction": 0.5})
    assert capsys.readouterr().out == ""
