# SPDX-License-Identifier: Apache-2.0
"""Progress display, and stopping at a step boundary on a signal."""

import contextlib
import math
import os
import signal
import threading
import time

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import TrainerCallback

from unipool.terminal import say

_STDERR = 2
_PLAIN_SECONDS = 10.0  # between two progress lines where there is no terminal


class StopSignals:
    """Inside `with`, SIGINT, SIGTERM and SIGHUP ask for a stop at the next step boundary.

    `received` is the signal's number, or None. A second SIGINT interrupts at once, and says
    `at_once`; the first says what a second one would do. What is ignored, such as SIGHUP under
    nohup, stays so.
    """

    def __init__(self, at_once: str = "interrupted at once: steps without a checkpoint are lost"):
        self.received: int | None = None
        self._at_once = at_once
        self._previous: dict[int, object] = {}

    def __enter__(self) -> "StopSignals":
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                if signal.getsignal(number) != signal.SIG_IGN:
                    self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *exception) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle(self, number, frame) -> None:
        if self.received is not None and number == signal.SIGINT:
            raise KeyboardInterrupt(self._at_once)
        if self.received is None and number == signal.SIGINT:
            self._tell("stopping after this step, with a checkpoint; Ctrl-C again stops at once")
        self.received = number

    @staticmethod
    def _tell(line: str) -> None:
        """To the terminal, past what the interrupted code may just be printing."""
        with contextlib.suppress(OSError):  # a terminal that is gone
            if os.isatty(_STDERR):
                os.write(_STDERR, f"\r{line}\n".encode())


class StopCallback(TrainerCallback):
    """Ends training with a checkpoint once `signals` has received one."""

    def __init__(self, signals: StopSignals):
        self._signals = signals

    def on_step_end(self, args, state, control, **kwargs):
        if self._signals.received is not None and state.global_step < state.max_steps:
            control.should_training_stop = True
            control.should_save = True


class ProgressDisplay(TrainerCallback):
    """A progress bar on a terminal, a line every ten seconds elsewhere.

    Training goes on where nobody listens: a terminal that hung up, a pipe that `head` closed.
    """

    def __init__(self, console: Console, name: str):
        self._console = console
        self._name = name
        self._bar: Progress | None = None
        self._task = None
        self._last_line = -math.inf

    def on_train_begin(self, args, state, control, **kwargs):
        if self._console.is_terminal:
            self._bar = Progress(
                TextColumn("{task.description}", markup=False),
                BarColumn(),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[status]}", markup=False),
                console=self._console,
            )
            self._task = self._bar.add_task(
                self._name, total=state.max_steps, completed=state.global_step, status=""
            )
            with contextlib.suppress(OSError):
                self._bar.start()

    def on_step_end(self, args, state, control, **kwargs):
        if self._bar is not None:
            with contextlib.suppress(OSError):
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
        self._say(f"{self._name}  step {state.global_step}: {line}")

    def _show(self, state, status: str) -> None:
        if self._bar is not None:
            with contextlib.suppress(OSError):
                self._bar.update(self._task, status=status)
            return
        now = time.monotonic()
        if now - self._last_line >= _PLAIN_SECONDS or state.global_step >= state.max_steps:
            self._last_line = now
            step = f"step {state.global_step}/{state.max_steps}"
            self._say(f"{self._name}  {step}: {status}")

    def _say(self, line: str) -> None:
        with contextlib.suppress(OSError):
            say(line, self._console)

    def close(self) -> None:
        if self._bar is not None:
            with contextlib.suppress(OSError):
                self._bar.stop()
            self._bar = None
