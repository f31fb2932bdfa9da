# SPDX-License-Identifier: Apache-2.0
"""Metrics file, progress display, and stopping at a step boundary on a signal."""

import json
import math
import signal
import threading
import time
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import TrainerCallback

from unipool.training.checkpoint import write_text

_PLAIN_SECONDS = 10.0  # between two progress lines where there is no terminal
_COLUMNS = ("loss", "lm_loss", "aux_loss", "grad_norm", "learning_rate", "tokens_per_second")


class StopSignals:
    """Inside `with`, SIGINT and SIGTERM ask for a stop at the next step boundary.

    `received` is the signal's number, or None. A second SIGINT interrupts at once.
    """

    def __init__(self):
        self.received: int | None = None
        self._previous: dict[int, object] = {}

    def __enter__(self) -> "StopSignals":
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *exception) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle(self, number, frame) -> None:
        if self.received is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = number


class StopCallback(TrainerCallback):
    """Ends training with a checkpoint once `signals` has received one."""

    def __init__(self, signals: StopSignals):
        self._signals = signals

    def on_step_end(self, args, state, control, **kwargs):
        if self._signals.received is not None and state.global_step < state.max_steps:
            control.should_training_stop = True
            control.should_save = True


class MetricsLog(TrainerCallback):
    """Appends one JSON object a line to `path`: one row a step and kind, also across resumes."""

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
        with open(self._path, "a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")


def _kind(row: dict) -> tuple[int, bool]:
    return row["step"], "val_loss" in row


def _finite(value: float) -> float | str:
    """JSON has no NaN or infinity; they are written as strings rather than left out."""
    return value if math.isfinite(value) else str(value)


def read_metrics(path: Path) -> list[dict]:
    """Rows of a metrics file; a last line cut short by a kill is left out."""
    rows = []
    if Path(path).exists():
        for line in Path(path).read_text(encoding="utf-8").splitlines():
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError:
                break
    return rows


def mean_rate(rows: list[dict]) -> float | None:
    """Mean tokens a second over the rows of a metrics file; the first of several is left out.

    Rows stand for equal numbers of steps, so this is the harmonic mean; the first row pays for
    warming up.
    """
    rates = [row["tokens_per_second"] for row in rows if "tokens_per_second" in row]
    rates = rates[1:] or rates
    return len(rates) / sum(1 / rate for rate in rates) if rates else None


class ProgressDisplay(TrainerCallback):
    """A progress bar on a terminal, a line every ten seconds elsewhere."""

    def __init__(self, console: Console, name: str):
        self._console = console
        self._name = name
        self._bar: Progress | None = None
        self._task = None
        self._last_line = -math.inf

    def on_train_begin(self, args, state, control, **kwargs):
        if self._console.is_terminal:
            self._bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[status]}"),
                console=self._console,
            )
            self._task = self._bar.add_task(
                self._name, total=state.max_steps, completed=state.global_step, status=""
            )
            self._bar.start()

    def on_step_end(self, args, state, control, **kwargs):
        if self._bar is not None:
            self._bar.update(self._task, completed=state.global_step)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "loss" in logs:
            status = f"loss {logs.get('lm_loss', logs['loss']):.3f}"
            if "tokens_per_second" in logs:
                status += f"  {logs['tokens_per_second']:,.0f} tokens/s"
            self._show(state, status)

    def on_evaluate(self, args, state, control, metrics=None, **kwargs):
        line = f"validation loss {metrics['val_loss']:.3f} nats/token"
        line += f", {metrics['val_bits_per_byte']:.3f} bits/byte"
        self._console.print(f"{self._name}  step {state.global_step}: {line}", highlight=False)

    def _show(self, state, status: str) -> None:
        if self._bar is not None:
            self._bar.update(self._task, status=status)
            return
        now = time.monotonic()
        if now - self._last_line >= _PLAIN_SECONDS or state.global_step >= state.max_steps:
            self._last_line = now
            step = f"step {state.global_step}/{state.max_steps}"
            self._console.print(f"{self._name}  {step}: {status}", highlight=False)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
