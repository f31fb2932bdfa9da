# SPDX-License-Identifier: Apache-2.0
"""One training run in one folder.

<out>/config.json      the options, as resolved
<out>/metrics.jsonl    one row per logged step or validation
<out>/checkpoints/     step-N, complete or absent
<out>/model/           the final model and tokenizer, as save_pretrained writes them
"""

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import torch
from rich.console import Console
from transformers import AutoModelForCausalLM, PrinterCallback, set_seed
from transformers.utils import logging as transformers_logging

import unipool.models  # noqa: F401  (registers UniPool with the Auto classes)
from unipool.data.tokenizer import load_tokenizer
from unipool.data.tokens import TokenData, check_length, default_cache, load_data
from unipool.errors import InputError, TrainingError, first_line
from unipool.files import (
    complete_folder,
    latest_checkpoint,
    open_own,
    remove_leftovers,
    step_of,
    write_text,
)
from unipool.model_folder import check_path
from unipool.models.loading import load_config, resolve_device
from unipool.models.memory import TRAINED, check_memory
from unipool.terminal import say
from unipool.training.callbacks import ProgressDisplay, SilenceWarning, StopCallback, StopSignals
from unipool.training.config import TrainConfig
from unipool.training.metrics import MetricsLog, read_metrics
from unipool.training.resuming import DATA_KEY, check_weights, last_usable, read_key
from unipool.training.trainer import WRITE_ERRORS, PoolTrainer
from unipool.training.validation import Validation

try:
    import fcntl
except ImportError:  # a system without; runs there have no lock
    fcntl = None

LOCK = ".lock"


@dataclass(frozen=True)
class RunResult:
    """What a run came to. `validation` is None if `signal` stopped it before its last step."""

    config: TrainConfig
    model: torch.nn.Module
    data: TokenData
    step: int
    validation: Validation | None
    signal: int | None


def run_training(
    config: TrainConfig,
    *,
    resume: bool = False,
    console: Console | None = None,
    name: str = "train",
) -> RunResult:
    """Train as `config` says, in the folder config.out; `resume`: from its last checkpoint.

    Raises InputError for options and data that cannot work, before anything is written, and
    TrainingError when training has to stop.
    """
    console = console or Console(quiet=True)
    transformers_logging.disable_progress_bar()
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise InputError("WORLD_SIZE: a run uses one process, got " + os.environ["WORLD_SIZE"])
    out = Path(config.out)
    check_path(out, "--out")
    device = resolve_device(config.device)
    if not resume:
        check_new(out)
    data, tokenizer = open_data(config, out)
    model_config = config.model_config(data.vocab_size, data.separator)
    check_trainable(config, model_config, device)
    with locked(out):
        if not resume:
            check_new(out)  # again: another run may have ended here since
        checkpoint = _prepare_folder(config, out, data, resume, console)
        if checkpoint is not None:  # its pool may have been resized since the run began
            model_config = _resumed_config(checkpoint, model_config)
        check_trainable(config, model_config, device)
        set_seed(config.seed)
        model = AutoModelForCausalLM.from_config(model_config, trust_remote_code=False)
        saved_tokenizer = tokenizer.hugging_face()
        if checkpoint is not None:
            check_weights(checkpoint, model)
        trainer = PoolTrainer(model, config, data, out / "checkpoints", device, saved_tokenizer)
        with StopSignals() as signals:
            _train(trainer, checkpoint, signals, out, console, name)
            step = trainer.state.global_step
            if step < config.steps:
                return RunResult(config, model, data, step, None, signals.received)
            if step not in trainer.validations:
                trainer.evaluate()
            validation = trainer.validation()
            _save_model(model, saved_tokenizer, out / "model")
    return RunResult(config, model, data, step, validation, signals.received)


def _train(trainer: PoolTrainer, checkpoint, signals, out: Path, console, name: str) -> None:
    display = ProgressDisplay(console, name)
    trainer.remove_callback(PrinterCallback)
    init_std = getattr(trainer.model.config, "initializer_range", 0.0)
    silence = SilenceWarning(console, lambda: trainer.silent_fractions, init_std)
    for callback in (StopCallback(signals), MetricsLog(out / "metrics.jsonl"), display, silence):
        trainer.add_callback(callback)
    try:
        trainer.train(resume_from_checkpoint=checkpoint)
    except InputError:
        raise
    except KeyboardInterrupt as error:
        last = latest_checkpoint(out / "checkpoints")
        where = f"last complete checkpoint: {last}" if last else "no checkpoint was written yet"
        raise KeyboardInterrupt(f"{str(error) or 'interrupted'}; {where}") from None
    except Exception as error:
        if checkpoint is not None and not (trainer.begun or isinstance(error, TrainingError)):
            raise InputError(
                f"{checkpoint} cannot be resumed from: {first_line(error)}; remove it, to go on "
                "from the one before"
            ) from error
        if not isinstance(error, TrainingError | OSError):
            raise
        last = latest_checkpoint(out / "checkpoints")
        where = f"last complete checkpoint: {last}" if last else "no checkpoint was written yet"
        raise TrainingError(f"{error}; {where}") from error
    finally:
        display.close()


def _resumed_config(checkpoint: Path, due):
    """The configuration in a checkpoint: one of the run's kind, and for its tokenizer."""
    found = load_config(checkpoint)
    for name in ("model_type", "vocab_size"):
        if getattr(found, name) != getattr(due, name):
            raise InputError(
                f"{checkpoint}/config.json must have {name}={getattr(due, name)} as the run has, "
                f"got {getattr(found, name)}; remove the checkpoint"
            )
    return found


def check_trainable(config: TrainConfig, model_config, device: str) -> None:
    """InputError unless weights, optimizer, ids of a step and logits of a micro-batch can fit."""
    logits = 4 * config.batch_size * config.seq_len * model_config.vocab_size
    check_memory(model_config, device, TRAINED, config.least_batch_bytes + logits)


def open_data(config: TrainConfig, out: Path):
    """(TokenData, tokenizer) of a run into `out`; InputError if the text is not long enough."""
    data, tokenizer = tokenise(config, data_cache(out))
    check_length(data, config.seq_len, ", ".join(config.data) or "the standard library's source")
    return data, tokenizer


def tokenise(config: TrainConfig, cache: Path):
    """(TokenData, tokenizer) of a run's text, made or found in `cache`."""
    tokenizer = load_tokenizer(Path(config.tokenizer) if config.tokenizer else None)
    options = {
        "field": config.field,
        "seed": config.seed,
        "val_fraction": config.val_fraction,
    }
    paths = [Path(path) for path in config.data]
    try:
        return load_data(paths, tokenizer, cache=cache, **options), tokenizer
    except OSError as error:
        raise InputError(f"data: cannot write token files: {error}") from error


def data_cache(out: Path) -> Path:
    """The user's cache, or a folder of the run where that cannot be written to."""
    cache = default_cache()
    return cache if _writable(cache) else out / ".cache"


def _writable(folder: Path) -> bool:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return False
    return os.access(folder, os.W_OK)


def check_new(out: Path, marker: str = "config.json", what: str = "run") -> None:
    """InputError unless `out` is free; `marker` is the file that tells a run, or another thing."""
    check_path(out, "--out")
    if out.exists() and not out.is_dir():
        raise InputError(f"--out {out} is a file")
    if (out / marker).exists():
        raise InputError(
            f"--out {out} already holds a {what}: add --resume to go on, or choose another folder"
        )
    if out.is_dir() and any(p for p in out.iterdir() if not p.name.startswith(".")):
        raise InputError(f"--out {out} is not empty and holds no {what}: choose another folder")


@contextlib.contextmanager
def locked(out: Path) -> Iterator[None]:
    """Keeps a second process out of the folder; the lock goes away with its process."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        handle = open_own(out / LOCK, "r+")  # held open for the whole run
    except OSError as error:
        raise InputError(f"--out {out}: cannot write there: {error.strerror}") from error
    busy = InputError(f"--out {out}: another process is training there")
    with handle:
        try:
            if fcntl is not None:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise busy from error
        except OSError:
            pass  # a file system without locks
        if not _is_at(handle, out / LOCK):  # it was removed, and another process may have its own
            raise busy
        yield


def _is_at(handle: IO, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(handle.fileno()), path.lstat())
    except OSError:
        return False


def _prepare_folder(config, out: Path, data: TokenData, resume: bool, console) -> Path | None:
    """Write config.json, or check that the run may go on; returns the checkpoint to start from."""
    checkpoints, key_file = out / "checkpoints", out / DATA_KEY
    remove_leftovers(out)
    remove_leftovers(checkpoints)
    checkpoint = None
    if resume:
        key = read_key(out)
        if key not in (None, data.key):
            raise InputError("--data: the text has changed since this run began; start a new run")
        read_metrics(out / "metrics.jsonl")
        checkpoint = last_usable(checkpoints, console)
        if checkpoint is not None and key is None:
            raise InputError(
                f"{key_file} is missing, so that nobody knows what {checkpoint} was trained on; "
                "start a new run, or put back the file"
            )
        if checkpoint is not None and step_of(checkpoint) > config.steps:
            raise InputError(f"--steps must be at least {step_of(checkpoint)}, got {config.steps}")
    try:
        checkpoints.mkdir(exist_ok=True)
        write_text(key_file, data.key + "\n")
        write_text(out / "config.json", config.to_json())
    except OSError as error:
        raise InputError(f"--out {out}: cannot write there: {error.strerror}") from error
    start = f"from step {step_of(checkpoint)}" if checkpoint else "from the beginning"
    if resume:
        say(f"resuming {out} {start}", console)
    return checkpoint


def _save_model(model, tokenizer, folder: Path) -> None:
    try:
        with complete_folder(folder) as staging:
            model.save_pretrained(staging)
            tokenizer.save_pretrained(staging)
    except WRITE_ERRORS as error:
        reason = str(error).strip().splitlines()[0]
        raise TrainingError(f"cannot write {folder}: {reason}") from error
