# SPDX-License-Identifier: Apache-2.0
"""Progress display, and stopping at a step boundary on a signal."""

import contextlib
import math
import os
import signal
import threading
import time
from collections.abc import Callable

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import TrainerCallback

from unipool.terminal import say

_STDERR = 2
_NEARLY_ALL, _WINDOWS = 0.9, 3  # of a layer's tokens; in a row
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
            known = [n for n in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, n)]
            for number in (getattr(signal, name) for name in known):
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


class SilenceWarning(TrainerCallback):
    """Says once that a layer goes on leaving nearly all its tokens without an expert.

    fractions: of each layer, the part of its tokens in the last logging window. One window alone is
    no reason: in the first steps a layer may fall silent and come back.
    """

    def __init__(self, console: Console, fractions: Callable[[], list[float]], init_std: float):
        self._console = console
        self._fractions = fractions
        self._init_std = init_std
        self._streak: dict[int, int] = {}  # windows in a row, by layer
        self._told = False

    def on_log(self, args, state, control, logs=None, **kwargs):
        if self._told or "silent_fraction" not in (logs or {}):
            return
        fractions = self._fractions()
        self._streak = {
            n: self._streak.get(n, 0) + 1 for n, part in enumerate(fractions) if part > _NEARLY_ALL
        }
        layers = [n for n, windows in self._streak.items() if windows >= _WINDOWS]
        if not layers:
            return
        self._told = True
        names = f"layer{'s' if len(layers) > 1 else ''} {', '.join(map(str, layers))}"
        with contextlib.suppress(OSError):
            say(
                f"warning: step {state.global_step}: in {names} no expert scores above zero for "
                f"{min(fractions[n] for n in layers):.0%} of the tokens or more, which pass it "
                "without an MLP and teach its router nothing: begin again with a greater "
                f"--init-std (here {self._init_std:g}) or a lower --lr",
                self._console,
            )


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
            if "silent_fraction" in logs:
                status += f"  {logs['silent_fraction']:.0%} silent"
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
