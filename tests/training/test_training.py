# SPDX-License-Identifier: Apache-2.0
"""Exact resume, honest losses."""

import errno
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")

from damage import flip
from rich.console import Console
from safetensors.torch import load_file
from torch.nn import functional as F

from unipool import files
from unipool.data.tokens import ValBlocks
from unipool.errors import InputError, TrainingError
from unipool.files import latest_checkpoint
from unipool.models.generation import generate_text
from unipool.models.loading import load_model
from unipool.training import metrics, trainer
from unipool.training.config import TrainConfig
from unipool.training.metrics import read_metrics
from unipool.training.run import run_training
from unipool.training.trainer import PoolTrainer
from unipool.training.validation import validate

pytestmark = pytest.mark.usefixtures("small_scale")

TORCH_SEES_CUDA = torch.cuda.is_available()


@pytest.fixture
def config(text, tmp_path, device):
    return TrainConfig(
        init_std=0.1,
        d_model=32,
        d_ff=32,
        layers=2,
        heads=2,
        pool_size=4,
        data=(str(text),),
        seq_len=32,
        batch_size=4,
        steps=12,
        lr=1e-2,
        min_lr=1e-3,
        warmup=0.25,
        device=device.type,
        out=str(tmp_path / "run"),
        save_every=3,
        eval_every=6,
        eval_tokens=512,
        log_every=4,
    )


@pytest.fixture
def dropout(monkeypatch):
    """Attention dropout, so that the state of the random generator matters to each step."""
    usual = TrainConfig.model_config

    def with_dropout(self, *args):
        result = usual(self, *args)
        result.attention_dropout = 0.2
        return result

    monkeypatch.setattr(TrainConfig, "model_config", with_dropout)


def rows(config):
    """The metrics of a run, without what a clock measured."""
    found = read_metrics(Path(config.out, "metrics.jsonl"))
    return [{k: v for k, v in row.items() if k != "tokens_per_second"} for row in found]


def weights(config):
    return load_file(Path(config.out, "model", "model.safetensors"))


def equal_weights(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)


def stop_after(monkeypatch, step, number=signal.SIGTERM):
    """Let this process receive a signal in the middle of step `step` + 1."""
    usual = PoolTrainer.training_step

    def training_step(self, *args, **kwargs):
        if self.state.global_step == step:
            os.kill(os.getpid(), number)
        return usual(self, *args, **kwargs)

    monkeypatch.setattr(PoolTrainer, "training_step", training_step)


# --- resume


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


def lose_position(self, resume_from_checkpoint=None, **kwargs):
    if resume_from_checkpoint is not None:
        resume_from_checkpoint = str(resume_from_checkpoint)
    return trainer.Trainer.train(self, resume_from_checkpoint, **kwargs)


def lose_balance(self, folder, model=None):
    trainer.Trainer._load_from_checkpoint(self, folder, model)
    for name, buffer in self.model.named_buffers():
        if "fraction" in name:
            buffer.zero_()


@pytest.mark.parametrize(
    ("method", "mutant"),
    [
        ("_load_rng_state", lose_random_state),
        ("train", lose_position),
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
COMMAND = """
import sys, torch
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
    deadline = time.monotonic() + 600
    while latest_checkpoint(checkpoints) is None or not (checkpoints / "step-2").exists():
        assert child.poll() is None, "the run ended before it could be killed"
        assert time.monotonic() < deadline
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


# --- losses that must not be hidden


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
        if "step-6" in str(path) and str(path).endswith("optimizer.pt"):
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


# --- optimisation


def test_losses_are_those_of_the_model_and_of_the_text(config):
    """The logged language loss is the cross-entropy of the very sequences that the order names."""
    from transformers import AutoModelForCausalLM, set_seed

    config = replace(config, steps=1, log_every=1)
    result = run_training(config)
    set_seed(config.seed)
    model = AutoModelForCausalLM.from_config(config.model_config(result.data.vocab_size, 256))
    from unipool.data.tokens import TrainBlocks

    blocks = TrainBlocks(result.data.train, config.seq_len, config.seed, 4)
    ids = torch.stack([blocks[i]["input_ids"] for i in range(4)])
    logits = model(input_ids=ids).logits.double()
    expected = F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).item()
    row = rows(config)[0]
    assert row["lm_loss"] == pytest.approx(expected, rel=1e-5)
    assert row["loss"] == pytest.approx(row["lm_loss"] + row["aux_loss"], rel=1e-5)


def test_accumulation_equals_one_large_batch(config, tmp_path):
    config = replace(config, balance="none", steps=6, log_every=1)
    run_training(config)
    halves = replace(config, batch_size=2, accumulate=2, out=str(tmp_path / "halves"))
    run_training(halves)
    for first, second in zip(rows(config), rows(halves), strict=True):
        for name in ("loss", "lm_loss", "val_loss"):
            if name in first:
                assert first[name] == pytest.approx(second[name], rel=1e-4)
        assert first.get("grad_norm", 0) == pytest.approx(second.get("grad_norm", 0), rel=1e-3)


def test_schedule_and_training_progress(config):
    config = replace(config, log_every=1, steps=40, warmup=0.1, eval_every=0)
    run_training(config)
    rates = [row["learning_rate"] for row in rows(config) if "loss" in row]
    assert rates[4] == pytest.approx(config.lr)
    assert rates[:5] == sorted(rates[:5])
    assert rates[4:] == sorted(rates[4:], reverse=True)
    assert config.min_lr <= rates[-1] < 1.1 * config.min_lr
    losses = [row["lm_loss"] for row in rows(config) if "loss" in row]
    assert losses[0] > math.log(256) - 0.5
    assert sum(losses[-5:]) / 5 < losses[0] - 1
    assert [row["step"] for row in rows(config) if "val_loss" in row] == [40]


@pytest.mark.any_device
def test_only_matrices_decay(config):
    result = run_training(replace(config, steps=1))
    names = PoolTrainer.get_decay_parameter_names(None, result.model)
    left = {n for n, _ in result.model.named_parameters()} - set(names)
    assert any(n.endswith("router.scale") for n in left)
    assert all("norm" in n or n.endswith(".scale") for n in left)
    assert any("gate_up_proj" in n for n in names)


def test_dense_and_bf16(config):
    dense = replace(config, form="dense", pool_size=None, steps=2, precision="bf16", log_every=1)
    result = run_training(dense)
    assert type(result.model).__name__ == "LlamaForCausalLM"
    assert result.validation.load is None
    assert rows(dense)[0]["loss"] == pytest.approx(math.log(320), rel=0.05)


# --- evaluation and generation


def test_evaluation_is_exact(config):
    result = run_training(replace(config, steps=3))
    model, blocks = result.model, ValBlocks(result.data.val, 32)
    model.train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    first, second = validate(model, blocks, 3), validate(model, blocks, 8)
    assert model.training
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert first.tokens == len(result.data.val) - 1
    nats = 0.0
    model.eval()
    with torch.no_grad():
        for start in blocks.starts:
            ids = torch.tensor(result.data.val[start : start + 32].astype("int64"))[None]
            ids = ids.to(config.device)
            scores = model(input_ids=ids).logits[0, :-1].double().log_softmax(-1)
            nats -= scores.gather(1, ids[0, 1:, None]).sum().item()
    assert first.loss == pytest.approx(nats / first.tokens, rel=1e-5)
    assert second.loss == pytest.approx(first.loss, rel=1e-5)
    load = torch.tensor(first.load)
    assert load.shape == (2, 4)
    assert torch.allclose(load.sum(1), torch.ones(2), atol=1e-6)


def random_states():
    """Of the generators that training goes on with."""
    return [torch.get_rng_state(), *(torch.cuda.get_rng_state_all() if TORCH_SEES_CUDA else [])]


def test_generation_from_run_checkpoint_and_model(config):
    run_training(replace(config, steps=3))
    out = Path(config.out)
    texts = []
    for path in (out, out / "model", out / "checkpoints" / "step-3"):
        model, tokenizer = load_model(path, config.device)
        assert model.config.use_cache
        state = random_states()
        texts.append(generate_text(model, tokenizer, "def ", 20, seed=1))
        assert all(map(torch.equal, random_states(), state))
    assert texts[0] == texts[1] == texts[2]
    assert texts[0].startswith("def ")
    assert generate_text(model, tokenizer, "def ", 20, seed=2) != texts[0]
    greedy = generate_text(model, tokenizer, "def ", 20, temperature=0.0, seed=1)
    assert greedy == generate_text(model, tokenizer, "def ", 20, temperature=0.0, seed=2)
    flip(out / "model" / "model.safetensors")
    with pytest.raises(InputError, match=r"is damaged: model\.safetensors does not match"):
        load_model(out)
    with pytest.raises(InputError, match="holds neither a model nor a run"):
        load_model(out.parent)


# --- folders and options that cannot work


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
        ({"scale": "1b"}, r"name must be one of"),
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
