# SPDX-License-Identifier: Apache-2.0
"""Hang-ups, second interrupts, terminals that are gone, clocks that jump, links to checkpoints."""

import os
import pty
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console
from runs import rows, stop_after

from unipool.files import (
    complete_folder,
    latest_checkpoint,
    prune,
    remove_leftovers,
    step_folder,
    step_of,
)
from unipool.training import callbacks
from unipool.training.callbacks import StopSignals
from unipool.training.run import run_training
from unipool.training.trainer import PoolTrainer

pytest.importorskip("transformers")
pytestmark = [pytest.mark.usefixtures("small_scale"), pytest.mark.any_device]


# --- signals


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_leaves_a_checkpoint(config, monkeypatch, number):
    stop_after(monkeypatch, 4, number)
    before = signal.getsignal(number)
    result = run_training(config)
    assert (result.signal, result.step) == (number, 5)
    assert latest_checkpoint(Path(config.out, "checkpoints")).name == "step-5"
    assert signal.getsignal(number) is before


def test_nohup_stays_in_force(config, monkeypatch):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        stop_after(monkeypatch, 4, signal.SIGHUP)
        assert run_training(config).step == config.steps
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_the_second_interrupt_says_that_it_was_one(config, monkeypatch):
    stop_after(monkeypatch, 5, signal.SIGINT)
    usual = PoolTrainer._save_checkpoint

    def save_slowly(self, *args):
        if self.state.global_step == 6:
            os.kill(os.getpid(), signal.SIGINT)
        usual(self, *args)

    monkeypatch.setattr(PoolTrainer, "_save_checkpoint", save_slowly)
    with pytest.raises(KeyboardInterrupt, match=r"^interrupted at once: steps without a") as caught:
        run_training(config)
    assert str(caught.value).endswith(f"last complete checkpoint: {config.out}/checkpoints/step-3")


PROGRAM = """
import os, signal, sys
from unipool import cli
from unipool.training import run
def run_training(*_, **__):
    with run.StopSignals():
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGINT)
run.run_training = run_training
sys.exit(cli.main(["train", "--out", sys.argv[1]]))
"""


def test_a_terminal_is_told_what_each_interrupt_does(tmp_path):
    ours, theirs = pty.openpty()
    command = [sys.executable, "-c", PROGRAM, str(tmp_path / "out")]
    child = subprocess.Popen(command, stdout=theirs, stderr=theirs)
    os.close(theirs)
    told = b""
    try:
        while part := os.read(ours, 4096):
            told += part
    except OSError:  # how a terminal without a process ends
        pass
    os.close(ours)
    assert child.wait() == 130
    lines = [line for line in told.decode().replace("\r", "\n").split("\n") if line]
    assert lines == [
        "stopping after this step, with a checkpoint; Ctrl-C again stops at once",
        "unipool: interrupted at once: steps without a checkpoint are lost",
    ]


def test_a_signal_handler_survives_a_terminal_that_is_gone(monkeypatch):
    def gone(*_):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(callbacks.os, "isatty", lambda _: True)
    monkeypatch.setattr(callbacks.os, "write", gone)
    with StopSignals() as signals:
        os.kill(os.getpid(), signal.SIGINT)
    assert signals.received == signal.SIGINT


class Gone:
    """A terminal, or a pipe, at whose other end nobody is."""

    def __init__(self, terminal):
        self.terminal = terminal

    def isatty(self):
        return self.terminal

    def write(self, _):
        raise OSError(5, "Input/output error")

    flush = lambda self: self.write("")  # noqa: E731
    encoding = "utf-8"


@pytest.mark.parametrize("terminal", [True, False])
def test_training_goes_on_where_nobody_listens(config, terminal):
    console = Console(file=Gone(terminal), force_terminal=terminal)
    assert run_training(config, console=console).step == config.steps


def test_a_reader_that_has_enough_is_no_error(tmp_path):
    program = "import sys; from unipool import cli; sys.exit(cli.main(['--help']))"
    read, write = os.pipe()
    os.close(read)
    child = subprocess.run([sys.executable, "-c", program], stdout=write, stderr=subprocess.PIPE)
    os.close(write)
    assert child.returncode == 128 + signal.SIGPIPE
    assert child.stderr == b""


# --- clocks


def touch(path, moment):
    os.utime(path, (moment, moment), follow_symlinks=False)


@pytest.mark.parametrize("days", [-3, -1.1, 1.1, 300])
def test_leftovers_of_the_past_and_of_the_future_are_removed(tmp_path, days):
    left = tmp_path / ".left.tmp"
    left.mkdir()
    (left / "file").write_text("half")
    for path in (left / "file", left):
        touch(path, time.time() + days * 86400)
    remove_leftovers(tmp_path, older_than=86400)
    assert not left.exists()


@pytest.mark.parametrize("days", [-0.4, 0, 0.4])
def test_what_is_being_written_is_not(tmp_path, days):
    """Also under a clock that is a few hours off, as machines with one disk may have."""
    busy = tmp_path / ".busy.tmp"
    busy.mkdir()
    touch(busy, time.time() + days * 86400)
    remove_leftovers(tmp_path, older_than=86400)
    assert busy.exists()


def test_a_folder_whose_files_grow_is_being_written(tmp_path):
    busy = tmp_path / ".busy.tmp"
    busy.mkdir()
    (busy / "tokens").write_text("more and more")
    touch(busy, time.time() - 3 * 86400)
    remove_leftovers(tmp_path, older_than=86400)
    assert busy.exists()


def test_a_run_removes_leftovers_of_whatever_time(config):
    folder = Path(config.out, "checkpoints", ".left.tmp")
    folder.mkdir(parents=True)
    Path(config.out, "config.json").write_text(config.to_json())
    touch(folder, time.time() + 1e9)
    run_training(replace(config, steps=1), resume=True)
    assert not folder.exists()


def test_a_link_left_over_goes_and_what_it_leads_to_stays(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "file").write_text("mine")
    (tmp_path / ".left.tmp").symlink_to(tmp_path / "mine")
    remove_leftovers(tmp_path)
    assert not (tmp_path / ".left.tmp").is_symlink()
    assert (tmp_path / "mine" / "file").exists()


def test_clocks_that_jump_change_no_run(config, monkeypatch):
    whole = replace(config, out=config.out + "-whole")
    run_training(whole)
    moments = iter(range(10**9, -(10**9), -(10**6)))
    monkeypatch.setattr(time, "time", lambda: float(next(moments)))
    run_training(config)
    assert rows(config) == rows(whole)


# --- links to checkpoints, and names


def save(root, *steps):
    for step in steps:
        with complete_folder(step_folder(root, step)) as folder:
            (folder / "weights").write_text(str(step))


def test_a_link_to_a_checkpoint_is_one_and_is_pruned_as_a_link(tmp_path):
    root, disk = tmp_path / "checkpoints", tmp_path / "disk"
    save(root, 1, 2)
    disk.mkdir()
    shutil.move(root / "step-2", disk / "step-2")
    (root / "step-2").symlink_to(disk / "step-2")
    assert latest_checkpoint(root) == root / "step-2"
    save(root, 3, 4)
    prune(root, keep=2)
    assert sorted(path.name for path in root.iterdir()) == ["step-3", "step-4"]
    assert (disk / "step-2" / "weights").read_text() == "2"


def test_a_link_in_the_place_of_a_new_checkpoint_is_replaced(config, tmp_path):
    """As a whole folder of checkpoints elsewhere may be."""
    disk = tmp_path / "disk"
    disk.mkdir()
    Path(config.out).mkdir()
    Path(config.out, "config.json").write_text(config.to_json())
    Path(config.out, "checkpoints").symlink_to(disk)
    (disk / "step-3").symlink_to(tmp_path / "nowhere")
    run_training(replace(config, steps=3), resume=True)
    assert not (disk / "step-3").is_symlink()
    assert latest_checkpoint(Path(config.out, "checkpoints")).name == "step-3"


def test_a_run_goes_on_from_a_link(config, tmp_path, monkeypatch):
    whole = replace(config, out=config.out + "-whole")
    run_training(whole)
    with monkeypatch.context() as patch:
        stop_after(patch, 5)
        run_training(config)
    checkpoints = Path(config.out, "checkpoints")
    shutil.move(checkpoints / "step-6", tmp_path / "elsewhere")
    (checkpoints / "step-6").symlink_to(tmp_path / "elsewhere")
    run_training(config, resume=True)
    assert rows(config)[-1] == rows(whole)[-1]
    assert (tmp_path / "elsewhere" / "optimizer.pt").exists()


@pytest.mark.parametrize("name", ["step-007", "step-٣", "step-1 ", "step--1", f"step-{'9' * 200}"])
def test_other_names_are_no_steps(name):
    assert step_of(Path(name)) == -1
