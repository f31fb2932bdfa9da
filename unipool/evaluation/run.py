# SPDX-License-Identifier: Apache-2.0
"""The scores of the model in a folder on zero-shot tasks."""

import importlib.util
from pathlib import Path

from unipool.checkpoints import checked_model
from unipool.configs import EvalConfig
from unipool.errors import InputError
from unipool.evaluation.local import LOCAL_TASKS, PAPER_TASKS, read_rows
from unipool.report.output import check_writable
from unipool.training.config import find_run


def run_evaluation(config: EvalConfig, trust_remote_code: bool = False):
    """(how it was done, for the reader of the numbers; the Scores). Raises InputError."""
    if importlib.util.find_spec("lm_eval") is None:
        raise ImportError('`unipool eval` needs lm-eval: pip install "unipool[eval]"')
    check_writable(config.json)
    folder = checked_model(config.checkpoint, trust_remote_code)
    names = list(dict.fromkeys(config.task or PAPER_TASKS))
    rows = None if config.data is None else _read_rows(config.data, names)
    about = {
        "checkpoint": str(folder),
        "data": "hub" if config.data is None else str(config.data),
    }
    described, scores = _score(folder, names, rows, config, trust_remote_code)
    return about | described, scores


def _read_rows(data: Path, names: list[str]) -> dict:
    for name in names:
        if name not in LOCAL_TASKS:
            allowed = ", ".join(LOCAL_TASKS)
            raise InputError(f"--task {name}: with --data it must be one of {allowed}")
    return {name: read_rows(data, name) for name in names}


def _score(folder: Path, names: list[str], rows: dict | None, config: EvalConfig, trust: bool):
    from unipool.evaluation.harness import HarnessModel, quiet, score_tasks
    from unipool.evaluation.tasks import load_tasks
    from unipool.models.loading import load_model, resolve_device

    device, run = resolve_device(config.device), find_run(folder)
    with quiet():
        tasks = load_tasks(names, rows)
        model, tokenizer = load_model(folder, device, trust)
        length = _max_length(run and run[1].seq_len, model.config, config.max_length)
        options = {
            "max_length": length,
            "batch_size": config.batch_size,
            "special_tokens": run is None,
        }
        scores = score_tasks(HarnessModel(model, tokenizer, **options), tasks, config.limit)
    about = {
        "model": type(model).__name__,
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": device,
        "limit": config.limit,
    }
    return about | options, scores


def _max_length(trained: int | None, config, given: int | None) -> int:
    own = getattr(config.get_text_config(), "max_position_embeddings", None)
    length = given or trained or own or 2048
    if own is not None and length > own:
        raise InputError(f"--max-length must be in [2, {own}], got {length}")
    return length
