# SPDX-License-Identifier: Apache-2.0
"""Three small models of equal active size, trained alike and compared as measured.

layer-private   a pool of experts for each layer, softmax router, one balance loss per layer
shared-pool     one pool of the same total for all layers, NormRouter, one balance loss
half-pool       the same with half the experts
"""

import contextlib
import json
import os
import time
from pathlib import Path

import torch
from rich.console import Console

import unipool
from unipool.configs import DemoConfig
from unipool.errors import InputError
from unipool.files import remove, write_text
from unipool.models import parameter_counts
from unipool.models.generation import generate_text
from unipool.models.loading import load_model
from unipool.report.runs import write_report
from unipool.report.tables import add_row, terminal
from unipool.terminal import say
from unipool.training.config import TrainConfig
from unipool.training.metrics import mean_rate, read_metrics
from unipool.training.run import LOCK, RunResult, locked, run_training

LAYERS = 4
EXPERTS_A_LAYER = 8  # of the layer-private model
PROMPT = "def "
# A little wider than its scale, which it is trained like.
SHAPE = {"scale": "tiny", "d_model": 128, "d_ff": 256, "layers": LAYERS, "heads": 4}
TRAINING = {"eval_every": 0, "eval_tokens": 1 << 16, "keep": 1}
_COLUMNS = {  # the terminal's table, narrow enough for 80 columns
    "model": lambda run: run["name"],
    "pools": lambda run: f"{run['num_pools']} x {run['pool_size']}",
    "params": lambda run: f"{run['params_total'] / 1e6:.2f}M",
    "experts": lambda run: f"{run['params_expert'] / 1e6:.2f}M",
    "active": lambda run: f"{run['params_active'] / 1e6:.2f}M",
    "val loss": lambda run: f"{run['val_loss']:.4f}",
    "bits/byte": lambda run: f"{run['val_bits_per_byte']:.4f}",
    "tokens/s": lambda run: f"{run['tokens_per_second']:,.0f}",
}


class DemoInterruptedError(Exception):
    """A signal ended the demo; what was trained so far is in its folder."""

    def __init__(self, signal: int):
        super().__init__(f"signal {signal}")
        self.signal = signal


def demo_configs(config: DemoConfig) -> dict[str, TrainConfig]:
    """The three runs by name. Same data, order, active size, steps and learning rate."""
    total = LAYERS * EXPERTS_A_LAYER
    forms = {
        "layer-private": {"form": "vanilla", "pool_size": EXPERTS_A_LAYER},
        "shared-pool": {"form": "unipool", "pool_size": total},
        "half-pool": {"form": "unipool", "pool_size": total // 2},
    }
    common = SHAPE | TRAINING | {"seed": config.seed, "device": config.device}
    common["steps"] = config.steps
    return {
        name: TrainConfig(**common, **form, out=str(config.out / name))
        for name, form in forms.items()
    }


def run_demo(config: DemoConfig, *, resume: bool = False, console: Console | None = None) -> dict:
    """Train, measure and report into a folder; returns the content of metrics.json."""
    with locked(config.out):
        if not resume:
            _clear(config.out, demo_configs(config))
        return _run_demo(config, resume, console or Console(quiet=True))


def _run_demo(config: DemoConfig, resume: bool, console: Console) -> dict:
    begin, out, configs = time.perf_counter(), config.out, demo_configs(config)
    runs, samples = [], {}
    for name, run in configs.items():
        say(f"  {_describe(run)}", console, title=name)
        go_on = resume and Path(run.out, "config.json").exists()
        result = run_training(run, resume=go_on, console=console, name=name)
        if result.signal is not None:
            raise DemoInterruptedError(result.signal)
        runs.append(_entry(name, run, result))
        trained = load_model(Path(run.out))
        samples[name] = generate_text(*trained, PROMPT, 240, 0.7, config.seed).rstrip()
    metrics = {
        "runs": runs,
        "torch": torch.__version__,
        "unipool": unipool.__version__,
        "seed": config.seed,
    }
    write_text(out / "metrics.json", json.dumps(metrics, indent=1) + "\n")
    notes = _notes(configs["layer-private"], result, time.perf_counter() - begin)
    page = write_report(out, "Shared and layer-private expert pools", notes, metrics, samples)
    _show(console, metrics, samples, notes, page)
    return metrics


def _clear(out: Path, configs: dict[str, TrainConfig]) -> None:
    """Remove the runs of an earlier demo, and nothing else; InputError, with all of them there, if
    one cannot be or another process is training in one."""
    with contextlib.ExitStack() as stack:
        folders = [Path(config.out) for config in configs.values()]
        folders = [folder for folder in folders if folder.exists() or folder.is_symlink()]
        for folder in folders:
            if folder.is_symlink() or not (folder / "config.json").is_file():
                raise InputError(f"--out {out}: {folder.name} is there and is no run of the demo")
            stack.enter_context(locked(folder))
        for folder in folders:
            for path in folder.iterdir():
                if path.name != LOCK:
                    remove(path)


def _describe(config: TrainConfig) -> str:
    pools = config.layers if config.form == "vanilla" else 1
    return f"{config.layers} layers, {pools} x {config.pool_size} experts, {config.steps} steps"


def _entry(name: str, config: TrainConfig, result: RunResult) -> dict:
    """One run in the schema of metrics.json.

    val_loss and train_loss: cross-entropy in nats per token (no balance loss). load: fraction of
    each layer's tokens that each expert of its pool got over the validation text.
    """
    model_config = result.model.config
    counts = parameter_counts(model_config)
    rows = [r for r in read_metrics(Path(config.out, "metrics.jsonl")) if "lm_loss" in r]
    return {
        "name": name,
        "num_pools": model_config.num_pools,
        "pool_size": model_config.num_experts,
        "params_total": counts["total"],
        "params_expert": counts["expert"],
        "params_active": counts["active"],
        "val_loss": result.validation.loss,
        "val_bits_per_byte": result.data.bits_per_byte(result.validation.loss),
        "train_loss": [[row["step"], row["lm_loss"]] for row in rows],
        "tokens_per_second": mean_rate(rows),
        "load": result.validation.load,
    }


def _notes(config: TrainConfig, result: RunResult, seconds: float) -> list[str]:
    data = result.data
    tokens = config.steps * config.tokens_per_step
    return [
        "Text: the source of Python's standard library on this machine, as bytes: "
        f"{data.train_documents:,} files ({data.train_bytes / 1e6:.1f} MB) to train on, "
        f"{data.val_documents:,} files ({data.val_bytes / 1e6:.1f} MB) held out.",
        f"Each model saw the same {tokens / 1e6:.2f} M tokens in the same order: {config.steps} "
        f"steps of {config.batch_size} sequences of {config.seq_len} bytes, learning rate "
        f"{config.lr:g} to {config.min_lr:g}. {_machine(result.model)}; {seconds / 60:.1f} min.",
        f"Small models, little training and one seed ({config.seed}): a small difference between "
        "two rows says nothing about models of another size.",
    ]


def _machine(model) -> str:
    device = next(model.parameters()).device
    if device.type == "cuda":
        return f"Device: {torch.cuda.get_device_name(device)}"
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"Device: CPU, threads: {min(torch.get_num_threads(), cores)}"


def _show(console: Console, metrics: dict, samples: dict, notes: list[str], page: Path) -> None:
    table = terminal(list(_COLUMNS), left=("model",))
    for run in metrics["runs"]:
        add_row(table, *(cell(run) for cell in _COLUMNS.values()))
    console.print(table)
    for name, text in samples.items():
        say(" writes:", console, title=name)
        say(text + "\n", console, lines=True)
    for note in notes:
        say(note, console)
    say(f"report: {page}", console)
