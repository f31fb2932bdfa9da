# SPDX-License-Identifier: Apache-2.0
"""What must not be hidden or begun: non-finite values, full disks, options that cannot work."""

import errno
import math
import os
import shutil
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from runs import stop_after
from safetensors.torch import load_file

from unipool.errors import InputError, TrainingError
from unipool.files import latest_checkpoint
from unipool.training import metrics
from unipool.training.config import TrainConfig
from unipool.training.run import run_training
from unipool.training.trainer import PoolTrainer

pytest.importorskip("transformers")
pytestmark = pytest.mark.usefixtures("small_scale")


def lose_value(monkeypatch, step, value):
    usual = PoolTrainer.compute_loss

    def compute_loss(self, *args, **kwargs):
        loss = usual(self, *args, **kwargs)
        return loss * value if self.state.global_step == step else loss

    monkeypatch.setattr(PoolTrainer, "compute_loss", compute_loss)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_non_finite_loss_stops_before_the_weights_change(config, monkeypatch, value):
    models = []
    usual = PoolTrainer.__init__

    def remember(self, model, *args, **kwargs):
        models.append(model)
        usual(self, model, *args, **kwargs)

    monkeypatch.setattr(PoolTrainer, "__init__", remember)
    lose_value(monkeypatch, 7, value)
    config = replace(config, save_every=7)
    with pytest.raises(TrainingError, match=r"step 8: loss is (nan|inf)") as failure:
        run_training(config)
    assert "last complete checkpoint: " in str(failure.value)
    assert "\n" not in str(failure.value)
    saved = load_file(Path(config.out, "checkpoints", "step-7", "model.safetensors"))
    assert all(
        torch.equal(dict(models[0].named_parameters())[k].cpu(), saved[k])
        for k, _ in models[0].named_parameters()
    )


def test_non_finite_gradient_stops(config, monkeypatch):
    usual = PoolTrainer.training_step

    def training_step(self, model, *args, **kwargs):
        loss = usual(self, model, *args, **kwargs)
        if self.state.global_step == 1:
            next(model.parameters()).grad[0, 0] = math.nan
        return loss

    monkeypatch.setattr(PoolTrainer, "training_step", training_step)
    with pytest.raises(
        TrainingError, match=r"step 2: loss is \d.*gradient norm nan.*no checkpoint"
    ):
        run_training(config)


@pytest.mark.any_device
@pytest.mark.parametrize(
    "error",
    [OSError(errno.ENOSPC, "No space left on device"), RuntimeError("PytorchStreamWriter failed")],
)
def test_disk_errors_keep_the_last_checkpoint(config, monkeypatch, error):
    usual = torch.save

    def failing(value, path, *args, **kwargs):
        if "checkpoint-6" in str(path) and str(path).endswith("optimizer.pt"):
            Path(path).write_bytes(b"half")
            raise error
        return usual(value, path, *args, **kwargs)

    monkeypatch.setattr(torch, "save", failing)
    with pytest.raises(TrainingError, match=r"cannot write checkpoint .*step-6.*step-3") as failure:
        run_training(config)
    assert "\n" not in str(failure.value)
    assert [p.name for p in Path(config.out, "checkpoints").iterdir()] == ["step-3"]
    monkeypatch.setattr(torch, "save", usual)
    assert run_training(config, resume=True).step == 12


@pytest.mark.any_device
def test_full_disk_for_the_log_is_one_line(config, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(metrics.MetricsLog, "on_log", full)
    with pytest.raises(TrainingError, match=r"No space left on device; last .*step-3"):
        run_training(config)


@pytest.mark.any_device
def test_second_interrupt_does_not_wait(config, monkeypatch):
    before = signal.getsignal(signal.SIGINT)
    stop_after(monkeypatch, 5, signal.SIGINT)
    usual = PoolTrainer._save_checkpoint

    def save_slowly(self, *args):
        if self.state.global_step == 6:
            os.kill(os.getpid(), signal.SIGINT)
        usual(self, *args)

    monkeypatch.setattr(PoolTrainer, "_save_checkpoint", save_slowly)
    with pytest.raises(KeyboardInterrupt):
        run_training(config)
    assert latest_checkpoint(Path(config.out, "checkpoints")).name == "step-3"
    assert signal.getsignal(signal.SIGINT) is before


@pytest.mark.any_device
def test_run_folder_must_be_new(config, tmp_path):
    run_training(replace(config, steps=1))
    with pytest.raises(InputError, match="already holds a run: add --resume"):
        run_training(config)
    other = tmp_path / "other"
    other.mkdir()
    (other / "thesis.tex").write_text("work")
    with pytest.raises(InputError, match="is not empty and holds no run"):
        run_training(replace(config, out=str(other)))
    with pytest.raises(InputError, match="is a file"):
        run_training(replace(config, out=str(other / "thesis.tex")))
    assert (other / "thesis.tex").read_text() == "work"


@pytest.mark.any_device
def test_two_processes_cannot_share_a_run(config):
    fcntl = pytest.importorskip("fcntl")
    Path(config.out).mkdir()
    with open(Path(config.out, ".lock"), "w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        with pytest.raises(InputError, match="another process is training there"):
            run_training(config)


@pytest.mark.any_device
def test_resume_refuses_other_text_and_other_options(config, text, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(text, copy)
    config = replace(config, data=(str(copy),), steps=1)
    run_training(config)
    with pytest.raises(InputError, match="--seq-len must stay 32 when a run is resumed, got 64"):
        config.resumed_with({"seq_len": 64})
    assert config.resumed_with({"steps": 5, "seq_len": 32}).steps == 5
    (copy / "new.py").write_text("x = 1\n")
    with pytest.raises(InputError, match="--data: the text has changed"):
        run_training(config, resume=True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layers": 2, "num_pools": 3}, r"num_pools must be in \[1, num_hidden_layers=2\], got 3"),
        ({"top_k": 5, "pool_size": 4}, r"num_experts_per_tok must be in \[1, 4\]"),
        ({"d_model": 33, "heads": 2}, r"hidden_size must be a multiple"),
        ({"scale": "1b"}, r"--scale must be one of"),
        ({"form": "dense", "router": "norm"}, r"--router has no meaning with --form dense"),
    ],
)
def test_impossible_models(options, message):
    with pytest.raises(InputError, match=message) as failure:
        TrainConfig(**options).model_config(320, 256)
    assert "\n" not in str(failure.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "--steps must be >= 1, got 0"),
        ({"seq_len": 1}, "--seq-len must be >= 2, got 1"),
        ({"lr": math.nan}, "--lr must be a positive number, got nan"),
        ({"min_lr": 1.0}, "--min-lr must be in"),
        ({"val_fraction": 1.0}, "--val-fraction must be in"),
        ({"seed": -1}, "--seed must be in"),
        ({"precision": "fp8"}, "--precision must be one of fp32, bf16, got fp8"),
    ],
)
def test_impossible_options(options, message):
    with pytest.raises(InputError, match=message):
        TrainConfig(**options)


def test_damaged_config_file(tmp_path):
    path = tmp_path / "config.json"
    with pytest.raises(InputError, match="cannot read"):
        TrainConfig.load(path)
    for content in ("{", "[]", '{"data": [], "colour": 1}', '{"data": [], "steps": 0}'):
        path.write_text(content)
        with pytest.raises(InputError):
            TrainConfig.load(path)
    path.write_text(TrainConfig(data=("a", "b"), top_k=2).to_json())
    assert TrainConfig.load(path) == TrainConfig(data=("a", "b"), top_k=2)
