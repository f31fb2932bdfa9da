# SPDX-License-Identifier: Apache-2.0
"""`unipool eval`; what it needs is imported when it runs."""

import importlib.util
import json
from pathlib import Path
from typing import Annotated, Literal

import typer


def evaluate(
    checkpoint: Annotated[
        Path, typer.Argument(help="run, checkpoint of one, or Hugging Face model folder")
    ],
    task: Annotated[
        list[str] | None,
        typer.Option(
            help="task, by its name in lm-evaluation-harness; repeatable [arc_easy, arc_challenge, "
            "piqa, hellaswag, winogrande, lambada_openai, race]"
        ),
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(
            help="folder of <task>.jsonl or .json files, rows with the fields of the task's data "
            "on the hub: evaluates offline [the hub's data]"
        ),
    ] = None,
    limit: Annotated[
        int | None, typer.Option(help="documents a task, the first ones [all]", min=1)
    ] = None,
    batch_size: Annotated[int, typer.Option(help="requests at a time", min=1)] = 8,
    max_length: Annotated[
        int | None,
        typer.Option(
            help="tokens that the model sees at a time [seq_len of the run, else the model's own]",
            min=2,
        ),
    ] = None,
    device: Annotated[Literal["auto", "cpu", "cuda"], typer.Option(help="where to run")] = "auto",
    json_file: Annotated[Path | None, typer.Option("--json", help="file for the numbers")] = None,
) -> None:
    """Score a model on zero-shot tasks, with lm-evaluation-harness."""
    from unipool.checkpoints import checked_model
    from unipool.evaluation.local import PAPER_TASKS
    from unipool.report.output import check_writable

    if importlib.util.find_spec("lm_eval") is None:
        raise ImportError('`unipool eval` needs lm-eval: pip install "unipool[eval]"')
    check_writable(json_file)
    folder = checked_model(checkpoint)
    names = list(dict.fromkeys(task or PAPER_TASKS))
    rows = None if data is None else _read_rows(data, names)
    about = {"checkpoint": str(folder), "data": "hub" if data is None else str(data)}
    options = {"limit": limit, "batch_size": batch_size, "max_length": max_length}
    described, scores = _score(folder, names, rows, device, **options)
    about |= described
    _show(about, scores)
    if json_file is not None:
        from unipool.files import write_text

        json_file.parent.mkdir(parents=True, exist_ok=True)
        write_text(json_file, json.dumps(about | scores.to_dict(), indent=1) + "\n")


def _read_rows(data: Path, names: list[str]) -> dict:
    from unipool.errors import InputError
    from unipool.evaluation.local import LOCAL_TASKS, read_rows

    for name in names:
        if name not in LOCAL_TASKS:
            allowed = ", ".join(LOCAL_TASKS)
            raise InputError(f"--task {name}: with --data it must be one of {allowed}")
    return {name: read_rows(data, name) for name in names}


def _score(
    folder: Path,
    names: list[str],
    rows: dict | None,
    device: str,
    *,
    limit: int | None,
    batch_size: int,
    max_length: int | None,
):
    """(how it was done, for the reader of the numbers; the scores) of the model in `folder`."""
    from unipool.evaluation.harness import HarnessModel, quiet, score_tasks
    from unipool.evaluation.tasks import load_tasks
    from unipool.models.loading import load_model, resolve_device
    from unipool.training.config import find_run

    device, run = resolve_device(device), find_run(folder)
    with quiet():
        tasks = load_tasks(names, rows)
        model, tokenizer = load_model(folder, device)
        length = _max_length(run and run[1].seq_len, model.config, max_length)
        options = {"max_length": length, "batch_size": batch_size, "special_tokens": run is None}
        scores = score_tasks(HarnessModel(model, tokenizer, **options), tasks, limit)
    about = {
        "model": type(model).__name__,
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": device,
        "limit": limit,
    }
    return about | options, scores


def _max_length(trained: int | None, config, given: int | None) -> int:
    from unipool.errors import InputError

    own = getattr(config.get_text_config(), "max_position_embeddings", None)
    length = given or trained or own or 2048
    if own is not None and length > own:
        raise InputError(f"--max-length must be in [2, {own}], got {length}")
    return length


def _show(about: dict, scores) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    def shown(value: float) -> str:
        return f"{value:.4f}" if abs(value) < 1e4 else f"{value:.4g}"

    def values(entry) -> tuple[str, str]:
        return shown(entry.value), "" if entry.stderr is None else f"± {shown(entry.stderr)}"

    console = Console()
    console.print(
        f"{about['model']}, lm-eval {scores.lm_eval}, zero-shot, at most {about['max_length']} "
        f"tokens; data: {about['data']}",
        highlight=False,
        soft_wrap=True,
    )
    table = Table(box=box.SIMPLE, padding=(0, 1, 0, 0))
    for heading in ("task", "metric", "value", "", "n"):
        left = heading in ("task", "metric")
        table.add_column(heading, justify="left" if left else "right", no_wrap=True)
    for score in scores.tasks:
        for metric, found in score.metrics.items():
            table.add_row(score.task, metric, *values(found), str(score.docs))
    table.add_section()
    for metric, mean in scores.averages.items():
        table.add_row("average", metric, *values(mean), f"{len(mean.tasks)} tasks")
    console.print(table)
    if scores.averages:
        console.print(
            "average: unweighted, of each task's acc; acc_norm: of acc_norm where a task has it",
            highlight=False,
            soft_wrap=True,
        )
    for score in scores.tasks:
        if score.cut:
            console.print(
                f"{score.task}: {score.cut} of {score.requests} requests were longer than "
                f"{about['max_length']} tokens and lost their beginning",
                highlight=False,
                soft_wrap=True,
            )
