# SPDX-License-Identifier: Apache-2.0
"""The metrics file of a run: how it is written, read, and averaged."""

import json
import math
from pathlib import Path
from typing import Annotated, Literal, TypedDict

from transformers import TrainerCallback

from unipool import schema
from unipool.errors import InputError
from unipool.files import open_own, write_text
from unipool.json_files import parse_json
from unipool.schema import Range

_COLUMNS = ("loss", "lm_loss", "aux_loss", "grad_norm", "learning_rate", "tokens_per_second")
_COLUMNS += ("silent_fraction",)


class MetricsLog(TrainerCallback):
    """Appends one JSON object a line to `path`: one row per step and kind, also across resumes."""

    def __init__(self, path: Path):
        self._path = Path(path)
        self._written: set[tuple] = set()

    def on_train_begin(self, args, state, control, **kwargs):
        # Steps after the checkpoint are going to be taken, and logged, again.
        rows = [row for row in read_metrics(self._path) if row["step"] <= state.global_step]
        write_text(self._path, "".join(json.dumps(row) + "\n" for row in rows))
        self._written = {_kind(row) for row in rows}

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "loss" in logs:
            names = (*_COLUMNS, "epoch")
        elif "val_loss" in logs:
            names = ("val_loss", "val_bits_per_byte")
        else:
            return
        row = {"step": state.global_step} | {n: _finite(logs[n]) for n in names if n in logs}
        if _kind(row) in self._written:
            return
        self._written.add(_kind(row))
        with open_own(self._path, "a") as file:
            file.write(json.dumps(row) + "\n")


def _kind(row: dict) -> tuple[int, bool]:
    return row["step"], "val_loss" in row


def _finite(value: float) -> float | str:
    """JSON has no NaN or infinity; they are written as strings rather than left out."""
    return value if math.isfinite(value) else str(value)


_Number = float | Literal["nan", "inf", "-inf"]


class _Required(TypedDict):
    step: Annotated[int, Range(min=0)]


class Row(_Required, total=False):
    """A line of metrics.jsonl: of a step, or of a validation."""

    loss: _Number
    lm_loss: _Number
    aux_loss: _Number
    grad_norm: _Number
    learning_rate: _Number
    tokens_per_second: Annotated[float, Range(above=0)]
    silent_fraction: Annotated[float, Range(min=0)]  # of (token, layer) pairs: no expert scored > 0
    epoch: float
    val_loss: _Number
    val_bits_per_byte: _Number


def read_metrics(path: Path) -> list[Row]:
    """Rows of a metrics file, none where there is no file; a last line cut short by a kill is left
    out. InputError, naming the line, for any other that is no row."""
    try:
        lines = Path(path).read_bytes().split(b"\n")
    except FileNotFoundError:
        return []
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from error
    rows = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = parse_json(line.decode("utf-8"))
            schema.check(row, Row)
        except ValueError as error:
            if number == len(lines):
                break
            raise InputError(
                f"{path}, line {number}, is damaged: {error}; remove the line, or the file"
            ) from error
        rows.append(row)
    return rows


def mean_rate(rows: list[dict]) -> float | None:
    """Mean tokens per second over the rows of a metrics file; the first of several is left out.

    Rows stand for equal numbers of steps, so this is the harmonic mean; the first row pays for
    warming up.
    """
    rates = [row["tokens_per_second"] for row in rows if "tokens_per_second" in row]
    rates = rates[1:] or rates
    return len(rates) / sum(1 / rate for rate in rates) if rates else None
