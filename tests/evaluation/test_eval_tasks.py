# SPDX-License-Identifier: Apache-2.0
"""The harness's own tasks and data, found by name, with and without the hub."""

import math
import os
import re
import subprocess
import sys

import datasets
import pytest
from eval_runs import by_task, errors, evaluate, save, successor_model

from unipool import cli
from unipool.evaluation import tasks as task_module
from unipool.evaluation.local import LOCAL_TASKS, PAPER_TASKS

pytest.importorskip("typer")
pytest.importorskip("transformers")
pytest.importorskip("lm_eval")


@pytest.fixture(scope="module")
def every_task():
    """The harness's index of all its tasks, which takes seconds to make."""
    return task_module.TaskManager()


@pytest.fixture
def hub(monkeypatch, every_task):
    """Stands for the hub: {(path, name): splits}; what was asked for is listed."""
    held, asked = {}, []

    def load_dataset(path, name=None, **options):
        asked.append((path, name))
        return datasets.DatasetDict(
            {split: datasets.Dataset.from_list(rows) for split, rows in held[path, name].items()}
        )

    made = task_module.TaskManager
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr(task_module, "TaskManager", lambda **kw: made(**kw) if kw else every_task)
    return held, asked


def test_the_hub_is_asked_for_the_tasks_own_data(tmp_path, hub, sets, rows, mixtral):
    held, asked = hub
    held["allenai/ai2_arc", "ARC-Challenge"] = {
        "train": rows["arc_challenge"][:1],
        "validation": rows["arc_challenge"][:1],
        "test": rows["arc_challenge"],
    }
    held["baber/piqa", None] = {"train": rows["piqa"][:1], "validation": rows["piqa"]}
    names = ["--task", "piqa", "--task", "arc_challenge", "--task", "piqa"]
    found = evaluate(tmp_path, mixtral, *names)
    assert asked == [("baber/piqa", None), ("allenai/ai2_arc", "ARC-Challenge")]
    assert found["data"] == "hub"
    local = evaluate(tmp_path, mixtral, *names, "--data", sets)
    assert asked[2:] == []
    for ours, theirs in zip(local["tasks"], found["tasks"], strict=True):
        assert theirs["config"].pop("dataset_path") in ("baber/piqa", "allenai/ai2_arc")
        theirs["config"].pop("dataset_name", None)
        ours["config"].pop("dataset_path")
        assert ours == theirs


def test_tags_and_other_kinds_of_task(tmp_path, hub):
    """A tag of two tasks, one whose answers are written, and one of whole texts."""
    held, _ = hub
    row = {"question": "Q", "choices": {"text": list("wxyz"), "label": list("ABCD")}}
    arc = [row | {"answerKey": key} for key in "BCBB"]
    for name in ("ARC-Easy", "ARC-Challenge"):
        held["allenai/ai2_arc", name] = dict.fromkeys(("train", "validation", "test"), arc)
    pages = [{"page": "y y y"}, {"page": "yy"}]
    held["EleutherAI/wikitext_document_level", "wikitext-2-raw-v1"] = dict.fromkeys(
        ("train", "validation", "test"), pages
    )
    model = successor_model("llama", {" ": "B", "B": ".", "y": " "}, " ")
    folder = save(tmp_path / "hf", model)
    tasks = ["--task", "ai2_arc", "--task", "arc_challenge_chat", "--task", "wikitext"]
    found = evaluate(tmp_path, folder, *tasks, "--max-length", 400)
    scores = by_task(found)
    assert list(scores) == ["arc_challenge", "arc_easy", "arc_challenge_chat", "wikitext"]
    written = scores["arc_challenge_chat"]["metrics"]["exact_match,remove_whitespace"]
    assert written["value"] == 0.75
    assert {score["requests"] for score in scores.values()} == {16, 4, 2}
    hit = -math.log1p(319 * math.exp(-8))
    nats = [
        3 * (hit - 8) + 2 * hit,
        2 * (hit - 8),
    ]  # y follows neither the start, nor a space, nor y
    bits = -sum(nats) / 7 / math.log(2)
    assert scores["wikitext"]["metrics"]["bits_per_byte"]["value"] == pytest.approx(bits, rel=1e-5)
    assert found["averages"]["acc"]["tasks"] == ["arc_challenge", "arc_easy"]


def test_a_task_that_the_harness_has_moved_is_found(tmp_path, monkeypatch, hub, sets, mixtral):
    moved = LOCAL_TASKS["piqa"]._replace(folder="elsewhere")
    monkeypatch.setitem(task_module.LOCAL_TASKS, "piqa", moved)
    found = evaluate(tmp_path, mixtral, "--data", sets, "--task", "piqa")
    assert found["tasks"][0]["docs"] == 9


def test_unknown_tasks_are_told_from_known_ones(capsys, hub, mixtral):
    said = errors(capsys, mixtral, "--task", "piqa", "--task", "pika")
    assert "--task pika is not a task of lm-eval" in said
    assert ", ".join(PAPER_TASKS) in said
    assert "`lm-eval ls tasks` lists all" in said


def test_offline_with_and_without_data(tmp_path, sets, mixtral):
    """In a process of its own, as the libraries read these variables when they are imported."""
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "home")}
    code = (
        "import sys; from unipool import cli; sets = sys.argv.pop(); command = sys.argv[1:]\n"
        "print('online', cli.main(command), flush=True)\n"
        "print('local', cli.main([*command, '--data', sets]))"
    )
    command = [sys.executable, "-c", code, "eval", str(mixtral), "--task", "hellaswag", str(sets)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    assert done.stdout.startswith("online 2\n")
    assert done.stdout.endswith("local 0\n")
    assert re.fullmatch(
        r"unipool: --task hellaswag: its data cannot be had from the hub \(.*\); "
        r"give a folder with hellaswag.jsonl as --data to evaluate offline\n",
        done.stderr,
    )
    assert not (tmp_path / "home").exists(), "no cache is left behind"


def test_help_lists_the_tasks(capsys):
    assert cli.main(["eval", "--help"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert ", ".join(PAPER_TASKS) in text
    assert set(PAPER_TASKS) <= set(LOCAL_TASKS)
