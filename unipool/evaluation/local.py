# SPDX-License-Identifier: Apache-2.0
"""Rows of local files with the shapes of the tasks' data sets on the hub, to evaluate offline.

A folder holds `<task>.jsonl` (a JSON object a line) or `<task>.json` (a list of them). A row needs
these fields; others are ignored:

    arc_easy, arc_challenge   question; choices: {"text": [...], "label": [...]}; answerKey: a label
    piqa                      goal, sol1, sol2; label: 0 or 1
    hellaswag                 activity_label, ctx_a, ctx_b; endings: [...]; label: number of one
    winogrande                sentence with a _ to fill; option1, option2; answer: "1" or "2"
    lambada_openai, -_standard   text, whose last word is to be predicted
    race                      article; problems: [{"question", "options" (4), "answer": "A" to "D"}]
                              or, as on the hub, that list as a string; the last one is asked
"""

import ast
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from unipool.errors import InputError
from unipool.json_files import parse_json

PAPER_TASKS = (
    "arc_easy",
    "arc_challenge",
    "piqa",
    "hellaswag",
    "winogrande",
    "lambada_openai",
    "race",
)


class _FaultError(ValueError):
    """What is wrong with a row, without the row's place."""


class LocalRows(NamedTuple):
    """rows: with just the fields that their task needs."""

    file: Path
    rows: list[dict]


def read_rows(folder: Path, task: str) -> LocalRows:
    """The rows of `task` in `folder`.

    Raises InputError, naming file, row (a line of a .jsonl) and field, for what does not fit.
    """
    file = _task_file(folder, task)
    read = LOCAL_TASKS[task].read
    rows = []
    for number, row in _json_rows(file):
        try:
            if not isinstance(row, dict):
                raise _FaultError(f"must be a JSON object, got {_shown(row)}")
            rows.append(read(row))
            json.dumps(rows[-1], ensure_ascii=False).encode()
        except _FaultError as fault:
            raise InputError(f"data: row {number} of {file} {fault}") from fault
        except UnicodeEncodeError as error:
            raise InputError(f"data: row {number} of {file} is not valid Unicode") from error
    if not rows:
        raise InputError(f"data: {file} has no rows")
    return LocalRows(file, rows)


def _task_file(folder: Path, task: str) -> Path:
    if not folder.is_dir():
        raise InputError(f"--data: {folder} is not a folder; give one that holds {task}.jsonl")
    for suffix in (".jsonl", ".json"):
        if (file := folder / (task + suffix)).is_file():
            return file
    raise InputError(
        f"--data: {folder} holds neither {task}.jsonl nor {task}.json; choose tasks with --task"
    )


def _json_rows(file: Path) -> Iterator[tuple[int, Any]]:
    number = 1
    try:
        text = file.read_text(encoding="utf-8-sig")
        if file.suffix == ".json":
            rows = parse_json(text, ours=False)
            if not isinstance(rows, list):
                raise InputError(f"data: {file} must be a list of objects, got {_shown(rows)}")
            yield from enumerate(rows, start=1)
            return
        for number, line in enumerate(text.split("\n"), start=1):
            if line.strip():
                yield number, parse_json(line, ours=False)
    except OSError as error:
        raise InputError(f"data: cannot read {file}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise InputError(f"data: {file} is not UTF-8 text (byte {error.start})") from error
    except InputError:
        raise
    except ValueError as error:
        where = file if file.suffix == ".json" else f"row {number} of {file}"
        raise InputError(f"data: {where} is not JSON: {error}") from error


# --- the fields of a row


def _take(row: dict, field: str, fits: Callable[[Any], bool], allowed: str) -> Any:
    if field not in row:
        names = ", ".join(map(str, list(row)[:8])) or "none"
        raise _FaultError(f"has no field {field!r} (fields: {names})")
    if not fits(row[field]):
        raise _FaultError(f"field {field!r} must be {allowed}, got {_shown(row[field])}")
    return row[field]


def _shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=True)
    return text if len(text) <= 60 else text[:57] + "..."


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _are_texts(value: Any) -> bool:
    return isinstance(value, list) and len(value) > 1 and all(map(_is_text, value))


def _texts(row: dict, *fields: str) -> dict[str, str]:
    return {field: _take(row, field, _is_text, "a text") for field in fields}


def _number(row: dict, field: str, count: int) -> int:
    """The field as an int in [0, count); the hub has some of these as strings."""
    allowed = [str(number) for number in range(count)]
    return int(_take(row, field, lambda v: str(v) in allowed, f"a number from 0 to {count - 1}"))


def _arc(row: dict) -> dict:
    def fits(value: Any) -> bool:
        text, label = (value.get("text"), value.get("label")) if isinstance(value, dict) else (0, 0)
        return _are_texts(text) and _are_texts(label) and len(text) == len(label)

    allowed = 'an object {"text": [...], "label": [...]}, as many texts as labels and at least 2'
    choices = _take(row, "choices", fits, allowed)
    labels = choices["label"]
    answer = _take(row, "answerKey", lambda v: v in labels, f"one of {', '.join(labels)}")
    choices = {"text": choices["text"], "label": labels}
    return _texts(row, "question") | {"choices": choices, "answerKey": answer}


def _piqa(row: dict) -> dict:
    return _texts(row, "goal", "sol1", "sol2") | {"label": _number(row, "label", 2)}


def _hellaswag(row: dict) -> dict:
    endings = _take(row, "endings", _are_texts, "a list of at least 2 texts")
    label = str(_number(row, "label", len(endings)))
    texts = _texts(row, "activity_label", "ctx_a", "ctx_b")
    return texts | {"endings": endings, "label": label}


def _winogrande(row: dict) -> dict:
    sentence = _take(row, "sentence", lambda v: _is_text(v) and "_" in v, "a text with a _")
    answer = _take(row, "answer", lambda v: v in ("1", "2"), '"1" or "2"')
    return {"sentence": sentence} | _texts(row, "option1", "option2") | {"answer": answer}


def _lambada(row: dict) -> dict:
    def fits(value: Any) -> bool:
        return _is_text(value) and len(value.split()) > 1

    return {"text": _take(row, "text", fits, "a text of at least 2 words")}


def _race(row: dict) -> dict:
    def parsed(value: Any) -> Any:
        try:
            return ast.literal_eval(value) if _is_text(value) else value
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            return None

    def fits(value: Any) -> bool:
        problems = parsed(value)
        return isinstance(problems, list) and bool(problems) and all(map(_is_problem, problems))

    allowed = 'a list of objects {"question", "options": 4 texts, "answer": "A" to "D"}'
    problems = _take(row, "problems", fits, allowed)
    return _texts(row, "article") | {"problems": repr(parsed(problems))}


def _is_problem(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and _is_text(value.get("question"))
        and _are_texts(value.get("options"))
        and len(value["options"]) == 4
        and value.get("answer") in ("A", "B", "C", "D")
    )


class LocalTask(NamedTuple):
    """folder: where the harness keeps the task. read: a row for the harness, or _FaultError."""

    folder: str
    read: Callable[[dict], dict]


LOCAL_TASKS = {
    "arc_easy": LocalTask("arc", _arc),
    "arc_challenge": LocalTask("arc", _arc),
    "piqa": LocalTask("piqa", _piqa),
    "hellaswag": LocalTask("hellaswag", _hellaswag),
    "winogrande": LocalTask("winogrande", _winogrande),
    "lambada_openai": LocalTask("lambada", _lambada),
    "lambada_standard": LocalTask("lambada", _lambada),
    "race": LocalTask("race", _race),
}
