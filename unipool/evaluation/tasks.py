# SPDX-License-Identifier: Apache-2.0
"""Tasks of lm-evaluation-harness by name, on the hub's data or on local rows. Needs lm-eval."""

from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

import datasets
import lm_eval.tasks
from lm_eval.tasks import TaskManager

from unipool.errors import InputError
from unipool.evaluation.local import LOCAL_TASKS, PAPER_TASKS, LocalRows

VERSION = version("lm_eval")
_FEWSHOT_SEED = 1234  # the harness's own default; no task here is few-shot unless it says so


def load_tasks(names: Sequence[str], rows: dict[str, LocalRows] | None) -> dict:
    """{name: task of the harness}, zero-shot unless the task's own configuration says otherwise.

    names: of tasks; groups and tags of the harness stand for all of their tasks. rows: of each
    name, to take the place of the hub's data (see local.py); None downloads what is not in the
    cache. Prompts, choices and metrics are the harness's in both cases.
    Raises InputError for an unknown name, data that cannot be had, or a task that runs code or
    shows pictures.
    """
    manager = _manager(names)
    for name in names:
        if name not in manager.all_tasks:
            raise InputError(
                f"--task {name} is not a task of lm-eval {VERSION}; the paper's are "
                f"{', '.join(PAPER_TASKS)}; `lm-eval ls tasks` lists all"
            )
    tasks = {}
    for name in names:
        if rows is not None:
            tasks |= manager.load(_with_rows(name, rows[name]))["tasks"]
            continue
        try:
            tasks |= manager.load(name)["tasks"]
        except Exception as error:  # the hub's client raises many kinds
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise InputError(
                f"--task {name}: its data cannot be had from the hub ({reason}); give a folder "
                f"with {name}.jsonl as --data to evaluate offline"
            ) from error
    for name, task in tasks.items():
        if getattr(task, "UNSAFE_CODE", False) or getattr(task, "MULTIMODAL", False):
            raise InputError(f"--task {name}: tasks that run code or show pictures are left out")
        if task.get_config("num_fewshot") is None:
            task.set_config("num_fewshot", 0)
        task.set_fewshot_seed(_FEWSHOT_SEED)
    return tasks


def _manager(names: Sequence[str]) -> TaskManager:
    """The harness's index of tasks: for the usual ones of their folders only, as all take long."""
    if all(name in LOCAL_TASKS for name in names):
        root = Path(lm_eval.tasks.__file__).parent
        folders = sorted({root / LOCAL_TASKS[name].folder for name in names})
        manager = TaskManager(include_path=folders, include_defaults=False)
        if all(name in manager.all_tasks for name in names):
            return manager
    return TaskManager()


def _with_rows(name: str, local: LocalRows) -> dict:
    """The task `name` with local rows as its only split: a group of one, whose options override."""
    data = datasets.DatasetDict(test=datasets.Dataset.from_list(local.rows))
    options = {
        "task": name,
        "custom_dataset": lambda **_: data,  # in memory: nothing is left in a cache
        "dataset_path": str(local.file),
        "dataset_name": None,
        "training_split": None,
        "validation_split": None,
        "test_split": "test",
    }
    return {"group": "local", "task": [options]}
