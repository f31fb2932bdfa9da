# SPDX-License-Identifier: Apache-2.0
"""The runs of a sweep: a folder each, trained by `unipool train` in processes of their own, so that
one that dies takes no other with it."""

import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from rich.console import Console

from unipool.compare.grid import Variant
from unipool.errors import InputError, TrainingError
from unipool.files import folder_fault, open_own, write_text
from unipool.terminal import say
from unipool.training.callbacks import StopSignals
from unipool.training.config import TrainConfig
from unipool.training.metrics import mean_rate, read_metrics
from unipool.training.run import locked

COMMAND = (sys.executable, "-m", "unipool.cli", "train", "--resume", "--out")  # then the folder
_TAIL = 1 << 16  # bytes of a log to look for its last line in
_POLL = 0.05  # seconds between two looks at the processes
_LOG, _ERROR = "log.txt", "error.txt"


@dataclass(frozen=True)
class Member:
    """One run: a variant with one seed."""

    variant: Variant
    config: TrainConfig

    @property
    def folder(self) -> Path:
        return Path(self.config.out)

    @property
    def title(self) -> str:
        return f"{self.variant.name} seed {self.config.seed}"


@dataclass(frozen=True)
class Outcome:
    """What a finished run measured.

    val_loss: nats per token; train_loss: [step, nats per token] pairs; tokens_per_second: the mean.
    """

    val_loss: float
    val_bits_per_byte: float
    tokens_per_second: float | None
    train_loss: list[list[float]]


def outcome(member: Member) -> Outcome | None:
    """The results of a run that is complete; None for one that is not, or was for fewer steps.

    Raises InputError for a metrics file that is damaged.
    """
    rows = read_metrics(member.folder / "metrics.jsonl")
    both = {"val_loss", "val_bits_per_byte"}
    last = next((row for row in reversed(rows) if both <= row.keys()), None)
    if last is None or last["step"] < member.config.steps:
        return None
    if folder_fault(member.folder / "model", checksums=False) is not None:
        return None
    steps = [row for row in rows if "lm_loss" in row]
    return Outcome(
        float(last["val_loss"]),
        float(last["val_bits_per_byte"]),
        mean_rate(steps),
        [[row["step"], float(row["lm_loss"])] for row in steps],
    )


def known_outcome(member: Member) -> Outcome | None:
    """As outcome, and None for a run whose metrics file is damaged."""
    try:
        return outcome(member)
    except InputError:
        return None


def failure(member: Member) -> str | None:
    """Why the last try of a run failed, in one line; None if it did not."""
    try:
        return _last_line(member.folder / _ERROR) or "for a reason that was not kept"
    except FileNotFoundError:
        return None


def _keep_reason(member: Member, reason: InputError) -> None:
    try:
        write_text(member.folder / _ERROR, f"{reason}\n")
    except OSError as error:
        raise TrainingError(f"cannot write {member.folder}: {error.strerror}") from reason


def _last_line(path: Path) -> str:
    """Of a text that may be long or damaged; nothing if it is empty."""
    with open(path, "rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - _TAIL))
        lines = file.read().decode("utf-8", errors="replace").splitlines()
    return next((line.strip() for line in reversed(lines) if line.strip()), "")


def run_members(members: list[Member], jobs: int, console: Console) -> int | None:
    """Train what is not complete, `jobs` runs at a time; returns the signal that ended it, if any.

    A run that fails leaves its reason in its folder, and the others go on. A signal stops every
    run at its next step, with a checkpoint to go on from.
    """
    queue, damaged = [], []
    for member in members:
        try:
            if outcome(member) is None:
                queue.append(member)
        except InputError as error:  # to train it again would lose what is there
            _keep_reason(member, error)
            damaged.append(f"{member.title}: failed: {error}")

    def tell(line: str) -> None:
        say(line, console)

    done = len(members) - len(queue)
    if complete := done - len(damaged):
        tell(f"{complete} of {len(members)} runs are complete")
    for line in damaged:
        tell(line)
    running: dict[Member, _Child] = {}
    with StopSignals("interrupted; runs at work still write their checkpoints") as signals:
        try:
            while (queue and signals.received is None) or running:
                while queue and len(running) < jobs and signals.received is None:
                    member = queue.pop(0)
                    try:
                        running[member] = _Child(member, jobs)
                        tell(f"{member.title}: begun, see {member.folder / _LOG}")
                    except InputError as error:
                        done += 1
                        _keep_reason(member, error)
                        tell(f"[{done}/{len(members)}] {member.title}: failed: {error}")
                time.sleep(_POLL)
                for member, child in list(running.items()):
                    if signals.received is not None:
                        child.stop()
                    if child.ended():
                        del running[member]
                        if (told := child.conclude()) is not None:
                            done += 1
                            tell(f"[{done}/{len(members)}] {member.title}: {told}")
        except OSError as error:
            raise TrainingError(f"cannot write {error.filename}: {error.strerror}") from error
        finally:
            for child in running.values():
                child.stop()
    return signals.received


class _Child:
    """`unipool train` on one member's folder."""

    def __init__(self, member: Member, jobs: int):
        self._member = member
        self._begin = time.monotonic()
        self._stopped = False
        _prepare(member)
        self._log: IO = open_own(member.folder / _LOG, "w")
        self._process = subprocess.Popen(
            [*COMMAND, str(member.folder)],
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=subprocess.STDOUT,
            env=_environment(jobs),
            start_new_session=True,  # a terminal's Ctrl-C reaches it through `stop` only
        )

    def stop(self) -> None:
        """Once: a second signal would not let it write its checkpoint."""
        if not self._stopped:
            self._stopped = True
            self._process.send_signal(signal.SIGTERM)

    def ended(self) -> bool:
        return self._process.poll() is not None

    def conclude(self) -> str | None:
        """Keep the reason of a failure; returns what to tell, None for a run that `stop` ended."""
        self._log.close()
        result = known_outcome(self._member)
        if self._process.returncode == 0 and result is not None:
            seconds = time.monotonic() - self._begin
            return f"validation loss {result.val_loss:.4f} nats/token ({seconds:.0f} s)"
        # -SIGTERM: it was told before it listened.
        if self._stopped and self._process.returncode in (128 + signal.SIGTERM, -signal.SIGTERM):
            return None
        reason = self._reason()
        write_text(self._member.folder / _ERROR, reason + "\n")
        return f"failed: {reason}"

    def _reason(self) -> str:
        code = self._process.returncode
        if code < 0:
            return f"killed by {signal.Signals(-code).name}; see {self._member.folder / _LOG}"
        line = _last_line(self._member.folder / _LOG)
        return (line or f"exit status {code}").removeprefix("unipool: ")


def _prepare(member: Member) -> None:
    """A folder that `unipool train --resume` accepts, beginning anew where no run has begun.

    InputError if another process is training there, such as one that outlived an earlier sweep.
    """
    member.folder.mkdir(parents=True, exist_ok=True)
    with locked(member.folder):
        (member.folder / _ERROR).unlink(missing_ok=True)
        shutil.rmtree(member.folder / "model", ignore_errors=True)  # of fewer steps
        write_text(member.folder / "config.json", member.config.to_json())


def _environment(jobs: int) -> dict[str, str]:
    affinity = getattr(os, "sched_getaffinity", None)
    cores = len(affinity(0)) if affinity else os.cpu_count() or 1
    return {"OMP_NUM_THREADS": str(max(1, cores // jobs))} | os.environ
