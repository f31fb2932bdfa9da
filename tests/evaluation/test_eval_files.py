# SPDX-License-Identifier: Apache-2.0
"""`unipool eval` of local files, and what does not fit: rows, files, options, checkpoints."""

import importlib.util
import json
import logging
import math
import os
import re
import shutil
import sys

import eval_sets
import pytest
import torch
from eval_runs import errors, random_unipool, save
from lm_eval.api.task import ConfigurableTask

from unipool.errors import InputError
from unipool.evaluation.harness import quiet
from unipool.evaluation.local import PAPER_TASKS, read_rows
from unipool.files import MANIFEST

pytest.importorskip("typer")
pytest.importorskip("transformers")
pytest.importorskip("lm_eval")


ROWS = eval_sets.make_rows(2)


@pytest.mark.parametrize("task", PAPER_TASKS)
def test_a_json_list_holds_the_same_rows(tmp_path, task):
    eval_sets.write_rows(tmp_path / "lines", ROWS)
    lines = read_rows(tmp_path / "lines", task)
    (tmp_path / f"{task}.json").write_text(json.dumps(ROWS[task], indent=1), encoding="utf-8-sig")
    listed = read_rows(tmp_path, task)
    assert listed.rows == lines.rows
    assert (lines.file.name, listed.file.name) == (f"{task}.jsonl", f"{task}.json")
    assert len(lines.rows) == 2
    assert "id" not in lines.rows[0], "only what the task needs"


def test_problems_of_race_as_a_list_or_as_a_string(tmp_path):
    plain = [dict(row, problems=eval(row["problems"])) for row in ROWS["race"]]
    eval_sets.write_rows(tmp_path, {"race": plain})
    listed = read_rows(tmp_path, "race").rows
    eval_sets.write_rows(tmp_path, {"race": ROWS["race"]})
    assert read_rows(tmp_path, "race").rows == listed == ROWS["race"]


CHOICES = "field 'choices' must be an object .* got "

OF_RACE = "field 'problems' must be a list of objects"

FAULTS = [
    ("arc_easy", "question", None, r"has no field 'question' \(fields: choices, answerKey, id\)"),
    ("arc_easy", "question", 3, "field 'question' must be a text, got 3"),
    ("arc_easy", "choices", ["a"], CHOICES + r'\["a"\]'),
    ("arc_easy", "choices", {"text": ["a", "b"], "label": ["A"]}, CHOICES),
    ("arc_easy", "choices", {"text": ["a"], "label": ["A"]}, CHOICES),
    ("arc_easy", "choices", {"text": ["a", "b", "c"], "label": ["A", "C"]}, CHOICES),
    ("arc_challenge", "answerKey", "Z", "field 'answerKey' must be one of 1, 2, 3, 4, got \"Z\""),
    ("piqa", "sol2", None, "has no field 'sol2'"),
    ("piqa", "label", 2, "field 'label' must be a number from 0 to 1, got 2"),
    ("piqa", "label", True, "field 'label' must be a number from 0 to 1, got true"),
    ("hellaswag", "label", "", "field 'label' must be a number from 0 to 3"),
    ("hellaswag", "endings", "end", "field 'endings' must be a list of at least 2 texts"),
    ("hellaswag", "ctx_b", None, "has no field 'ctx_b'"),
    ("winogrande", "sentence", "no gap", "field 'sentence' must be a text with a _"),
    ("winogrande", "answer", 1, 'field \'answer\' must be "1" or "2", got 1'),
    ("winogrande", "option1", None, "has no field 'option1'"),
    ("lambada_openai", "text", "one ", "field 'text' must be a text of at least 2 words"),
    ("lambada_standard", "text", None, "has no field 'text'"),
    ("race", "problems", "[1, 2]", OF_RACE),
    ("race", "problems", "import os", OF_RACE),
    ("race", "problems", [], OF_RACE),
    ("race", "problems", [{"question": "?", "options": list("abc"), "answer": "A"}], OF_RACE),
    ("race", "problems", [{"question": "?", "options": list("abcd"), "answer": "E"}], OF_RACE),
    ("race", "article", "\ud800", "is not valid Unicode"),
]


@pytest.mark.parametrize(("task", "field", "value", "message"), FAULTS)
def test_a_row_that_does_not_fit_is_named(tmp_path, task, field, value, message):
    first, second = ROWS["lambada_openai" if task == "lambada_standard" else task]
    second = {key: part for key, part in second.items() if key != field}
    if value is not None:
        second[field] = value
    file = tmp_path / f"{task}.jsonl"
    file.write_text(json.dumps(first) + "\n\n" + json.dumps(second))
    with pytest.raises(InputError, match=f"row 3 of {file} {message}") as error:
        read_rows(tmp_path, task)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("piqa.jsonl", b"", "piqa.jsonl has no rows"),
        ("piqa.json", b"[]", "piqa.json has no rows"),
        ("piqa.json", b"{}", r"piqa.json must be a list of objects, got \{\}"),
        ("piqa.json", b"[1]", "row 1 of .*piqa.json must be a JSON object, got 1"),
        ("piqa.json", b"[", "piqa.json is not JSON"),
        ("piqa.jsonl", b"{\n", "row 1 of .*piqa.jsonl is not JSON"),
        ("piqa.jsonl", b"\xff", "piqa.jsonl is not UTF-8 text"),
        ("race.jsonl", b"{}", "holds neither piqa.jsonl nor piqa.json; choose tasks with --task"),
    ],
)
def test_a_file_that_does_not_fit_is_named(tmp_path, capsys, mixtral, name, content, message):
    (tmp_path / name).write_bytes(content)
    assert re.search(message, errors(capsys, mixtral, "--data", tmp_path, "--task", "piqa"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--task", "arc"], "--task arc: with --data it must be one of arc_easy, .*, race"),
        (["--limit", "0"], "--limit"),
        (["--batch-size", "0"], "--batch-size"),
        (["--max-length", "513"], r"--max-length must be in \[2, 512\], got 513"),
        (["--max-length", "9"], "--max-length 9: task .* has an answer of .* tokens"),
        (["--json", "/dev/null/x.json"], "cannot write /dev/null/x.json"),
        (["--data", "/no/such"], "--data: /no/such is not a folder"),
        (["--shots", "3"], "--shots"),
    ],
)
def test_options_that_do_not_fit(capsys, mixtral, sets, arguments, message):
    assert re.search(message, errors(capsys, mixtral, "--data", sets, *arguments))


def test_checkpoints_that_cannot_be_used(tmp_path, capsys, run, sets):
    assert re.search(r"/no/such is not a folder; give a run", errors(capsys, "/no/such"))
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    shutil.rmtree(copy / "model")
    checkpoint = next((copy / "checkpoints").glob("step-*"))
    (checkpoint / MANIFEST).unlink()
    assert "is incomplete" in errors(capsys, checkpoint, "--data", sets)
    assert "holds neither a model nor a run with a checkpoint" in errors(capsys, copy)
    folder = save(tmp_path / "small", random_unipool(vocab_size=256))
    said = errors(capsys, folder, "--data", sets)
    assert "embeddings of the ids below 256" in said
    broken = random_unipool()
    torch.nn.init.constant_(broken.lm_head.weight, math.nan)
    said = errors(capsys, save(tmp_path / "nan", broken), "--data", sets, "--task", "piqa")
    assert "its log-probabilities are not numbers" in said


def test_cuda_where_there_is_none(monkeypatch, capsys, mixtral, sets):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    said = errors(capsys, mixtral, "--data", sets, "--device", "cuda")
    assert "--device cuda: PyTorch sees no CUDA device" in said


@pytest.mark.parametrize("kind", ["UNSAFE_CODE", "MULTIMODAL"])
def test_tasks_that_run_code_or_show_pictures(monkeypatch, capsys, mixtral, sets, kind):
    monkeypatch.setattr(ConfigurableTask, kind, True, raising=False)
    said = errors(capsys, mixtral, "--data", sets, "--task", "piqa")
    assert "--task piqa: tasks that run code or show pictures are left out" in said


@pytest.mark.parametrize("before", [None, "0"])
def test_quiet_puts_everything_back(monkeypatch, capsys, before):
    if before is None:
        monkeypatch.delenv("DISABLE_MULTIPROC", raising=False)
    else:
        monkeypatch.setenv("DISABLE_MULTIPROC", before)
    logger = logging.getLogger("lm_eval")
    monkeypatch.setattr(logger, "level", logging.INFO)

    @quiet()
    def fail():
        print("progress")
        assert (logger.level, os.environ["DISABLE_MULTIPROC"]) == (logging.ERROR, "1")
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert (logger.level, os.environ.get("DISABLE_MULTIPROC")) == (logging.INFO, before)
    print("after")
    assert capsys.readouterr().out == "after\n"


def test_without_lm_eval_one_line_says_what_to_install(monkeypatch, capsys, mixtral):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    said = errors(capsys, mixtral, code=1)
    assert 'needs lm-eval: pip install "unipool[eval]"' in said
