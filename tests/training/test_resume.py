# SPDX-License-Identifier: Apache-2.0
"""Runs that go on: after a stop, a kill, a damaged checkpoint."""

import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from damage import flip
from rich.console import Console
from runs import rows, stop_after
from safetensors.torch import load_file

from unipool import files
from unipool.errors import InputError
from unipool.files import latest_checkpoint
from unipool.training import trainer
from unipool.training.config import TrainConfig
from unipool.training.metrics import read_metrics
from unipool.training.run import run_training
from unipool.training.trainer import PoolTrainer

pytest.importorskip("transformers")
pytestmark = pytest.mark.usefixtures("small_scale")


@pytest.fixture
def dropout(monkeypatch):
    """Attention dropout, so that the state of the random generator matters to each step."""
    usual = TrainConfig.model_config

    def with_dropout(self, *args):
        result = usual(self, *args)
        result.attention_dropout = 0.2
        return result

    monkeypatch.setattr(TrainConfig, "model_config", with_dropout)


def weights(config):
    return load_file(Path(config.out, "model", "model.safetensors"))


def equal_weights(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)


@pytest.fixture
def uninterrupted(config, dropout, tmp_path):
    whole = replace(config, out=str(tmp_path / "whole"))
    assert run_training(whole).step == 12
    return whole


def interrupt_and_resume(config, monkeypatch, step=5):
    """Stop by a signal while step `step` + 1 runs, then resume to the end."""
    with monkeypatch.context() as patch:
        stop_after(patch, step)
        stopped = run_training(config)
    assert stopped.signal == signal.SIGTERM
    assert stopped.step == step + 1
    assert latest_checkpoint(Path(config.out, "checkpoints")).name == f"step-{step + 1}"
    assert not Path(config.out, "model").exists()
    return run_training(config, resume=True)


@pytest.mark.parametrize("step", [4, 5])
def test_resumed_run_equals_an_uninterrupted_one(config, uninterrupted, monkeypatch, step):
    """Also where the checkpoint cuts a logging window in two (log_every = 4)."""
    result = interrupt_and_resume(config, monkeypatch, step)
    assert rows(config) == rows(uninterrupted)
    assert [row["step"] for row in rows(config)] == [4, 6, 8, 12, 12]
    assert equal_weights(weights(config), weights(uninterrupted))
    fractions = {k: v for k, v in result.model.state_dict().items() if "fraction" in k}
    assert fractions, "the balancer's state is part of the model"
    assert all(v.sum() > 0 for v in fractions.values())
    optimizers = [
        torch.load(Path(c.out, "checkpoints", "step-12", "optimizer.pt"))
        for c in (config, uninterrupted)
    ]
    for first, second in zip(*(o["state"].values() for o in optimizers), strict=True):
        assert all(torch.equal(first[k], second[k]) for k in first)


def lose_random_state(self, folder):
    torch.manual_seed(1)


USUAL_LOADER = PoolTrainer.get_train_dataloader


def lose_position(self):
    step, self._first_step = self._first_step, 0
    try:
        return USUAL_LOADER(self)
    finally:
        self._first_step = step


def lose_balance(self, folder, model=None):
    trainer.Trainer._load_from_checkpoint(self, folder, model)
    for name, buffer in self.model.named_buffers():
        if "fraction" in name:
            buffer.zero_()


@pytest.mark.parametrize(
    ("method", "mutant"),
    [
        ("_load_rng_state", lose_random_state),
        ("get_train_dataloader", lose_position),
        ("_load_from_checkpoint", lose_balance),
        ("restore_window", lambda self: None),
    ],
)
def test_a_lost_part_of_the_state_shows(config, uninterrupted, monkeypatch, method, mutant):
    """The comparison of the test above notices whatever a checkpoint might fail to restore."""
    with monkeypatch.context() as patch:
        stop_after(patch, 5)
        run_training(config)
    monkeypatch.setattr(PoolTrainer, method, mutant, raising=False)
    run_training(config, resume=True)
    assert rows(config) != rows(uninterrupted)


def test_resume_falls_back_to_the_checkpoint_before_a_damaged_one(
    config, uninterrupted, monkeypatch, capsys
):
    with monkeypatch.context() as patch:
        stop_after(patch, 7)
        run_training(config)
    checkpoints = Path(config.out, "checkpoints")
    assert sorted(p.name for p in checkpoints.iterdir()) == ["step-6", "step-8"]
    flip(checkpoints / "step-8" / "optimizer.pt")
    run_training(config, resume=True, console=Console(width=500))
    assert "step-8 is passed over: optimizer.pt does not match" in capsys.readouterr().out
    assert (checkpoints / "damaged-step-8").is_dir()
    assert rows(config) == rows(uninterrupted)
    assert equal_weights(weights(config), weights(uninterrupted))


# `unipool`, with the plain attention on a GPU that conftest.py chooses there: bits are compared.
# It waits in its 31st step, however late the look at its checkpoints is.
COMMAND = """
import signal, sys, torch
from unipool.training.trainer import PoolTrainer
usual = PoolTrainer.training_step
def training_step(self, *args, **kwargs):
    while self.state.global_step == 30:
        signal.pause()
    return usual(self, *args, **kwargs)
PoolTrainer.training_step = training_step
if "--device=cuda" in sys.argv:
    torch.backends.cuda.enable_flash_sdp(False)
    torch.backends.cuda.enable_mem_efficient_sdp(False)
    torch.backends.cuda.enable_cudnn_sdp(False)
from unipool import cli
sys.exit(cli.main())
"""


def test_killed_run_resumes_exactly(config, tmp_path):
    """SIGKILL to a real `unipool train`, somewhere after its second checkpoint."""
    whole = replace(config, steps=40, save_every=1, out=str(tmp_path / "whole"))
    run_training(whole)
    config = replace(whole, out=config.out)
    options = ["--d-model=32", "--d-ff=32", "--layers=2", "--heads=2", "--pool-size=4"]
    options += [f"--data={config.data[0]}", "--seq-len=32", "--batch-size=4", "--steps=40"]
    options += [
        "--lr=1e-2",
        "--min-lr=1e-3",
        "--warmup=0.25",
        f"--device={config.device}",
        "--save-every=1",
    ]
    options += ["--eval-every=6", "--eval-tokens=512", "--log-every=4", "--init-std=0.1"]
    options += [f"--out={config.out}"]
    command = [sys.executable, "-c", COMMAND, "train", *options]
    child = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    checkpoints = Path(config.out, "checkpoints")
    while (newest := latest_checkpoint(checkpoints)) is None or files.step_of(newest) < 2:
        assert child.poll() is None, "the run ended before it could be killed"
        time.sleep(0.01)
    child.kill()
    child.wait()
    assert 2 <= files.step_of(latest_checkpoint(checkpoints)) < 40
    run_training(TrainConfig.load(Path(config.out, "config.json")), resume=True)
    assert rows(config) == rows(whole)
    assert equal_weights(weights(config), weights(whole))
    assert not list(checkpoints.glob(".*.tmp"))


@pytest.mark.any_device
def test_resume_without_a_checkpoint_begins_anew(config, uninterrupted):
    Path(config.out).mkdir()
    Path(config.out, "config.json").write_text(config.to_json())
    Path(config.out, "metrics.jsonl").write_text('{"step": 4, "loss": 9.0}\n{"step": 8, "lo')
    run_training(config, resume=True)
    assert rows(config) == rows(uninterrupted)


@pytest.mark.any_device
def test_resume_of_a_finished_run_changes_nothing(config):
    first = run_training(config)
    before = weights(config), read_metrics(Path(config.out, "metrics.jsonl"))
    again = run_training(config, resume=True)
    assert again.validation == first.validation
    assert read_metrics(Path(config.out, "metrics.jsonl")) == before[1]
    assert equal_weights(weights(config), before[0])


@pytest.mark.any_device
def test_longer_resume(config):
    run_training(replace(config, steps=6))
    result = run_training(replace(config, steps=8), resume=True)
    assert result.step == 8
    with pytest.raises(InputError, match="--steps must be at least 8, got 4"):
        run_training(replace(config, steps=4), resume=True)
