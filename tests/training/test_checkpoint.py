# SPDX-License-Identifier: Apache-2.0
"""Checkpoint folders: complete or absent, whatever kills the writer; damaged ones are seen."""

import errno
import json
import os
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from damage import flip

from unipool import files
from unipool.files import (
    complete_folder,
    folder_fault,
    latest_checkpoint,
    prune,
    remove_leftovers,
    step_folder,
    write_text,
)


def fill(folder, step):
    (folder / "weights.bin").write_bytes(random.Random(step).randbytes(200_000))
    (folder / "state.json").write_text(json.dumps({"step": step}))
    (folder / "sub").mkdir()
    (folder / "sub" / "more.bin").write_bytes(b"x" * step)


def save(root, *steps):
    for step in steps:
        with complete_folder(step_folder(root, step)) as folder:
            fill(folder, step)


def test_folder_is_complete_or_absent(tmp_path):
    save(tmp_path, 1)
    assert folder_fault(tmp_path / "step-1") is None
    with pytest.raises(ZeroDivisionError), complete_folder(tmp_path / "step-2") as folder:
        (folder / "weights.bin").write_bytes(b"half" * (1 // 0))
    assert [p.name for p in tmp_path.iterdir()] == ["step-1"]
    save(tmp_path, 1)  # replacing one that is there
    assert [p.name for p in tmp_path.iterdir()] == ["step-1"]
    assert folder_fault(tmp_path / "step-1") is None


def test_failing_replacement_keeps_the_old_folder(tmp_path, monkeypatch):
    save(tmp_path, 1)
    before = (tmp_path / "step-1" / "weights.bin").read_bytes()

    def full(path):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(files, "sync_path", full)
    with pytest.raises(OSError, match="No space"), complete_folder(tmp_path / "step-1") as folder:
        (folder / "weights.bin").write_bytes(b"new")
    assert (tmp_path / "step-1" / "weights.bin").read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["step-1"]


def test_failing_write_keeps_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "config.json"
    write_text(path, "old")

    def full(handle):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_text(path, "new")
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["config.json"]


def truncate(path):
    os.truncate(path, path.stat().st_size // 2)


@pytest.mark.parametrize("damage", [truncate, flip, Path.unlink], ids=["cut", "flipped", "gone"])
@pytest.mark.parametrize("name", ["weights.bin", "state.json", "sub/more.bin", "manifest.json"])
def test_damaged_checkpoints_are_passed_over(tmp_path, name, damage):
    save(tmp_path, 9, 10)
    assert latest_checkpoint(tmp_path).name == "step-10"
    damage(tmp_path / "step-10" / name)
    told = []
    found = latest_checkpoint(tmp_path, lambda path, fault: told.append((path.name, fault)))
    assert found.name == "step-9"
    assert [n for n, _ in told] == ["step-10"]
    damage(tmp_path / "step-9" / name)
    assert latest_checkpoint(tmp_path) is None


def test_latest_checkpoint_ignores_everything_else(tmp_path):
    assert latest_checkpoint(tmp_path / "none") is None
    save(tmp_path, 2, 10)
    (tmp_path / "step-11").mkdir()
    (tmp_path / "step-12").write_text("a file")
    shutil.copytree(tmp_path / "step-10", tmp_path / ".step-13.77.tmp")
    shutil.copytree(tmp_path / "step-10", tmp_path / "damaged-step-14")
    assert latest_checkpoint(tmp_path).name == "step-10"
    remove_leftovers(tmp_path)
    assert not list(tmp_path.glob(".*.tmp"))


def test_prune_keeps_the_newest_complete_ones(tmp_path):
    save(tmp_path, 1, 2, 3, 4)
    truncate(tmp_path / "step-3" / "weights.bin")
    prune(tmp_path, keep=2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-2", "step-3", "step-4"]


WRITER = """
import importlib.util, random, sys
spec = importlib.util.spec_from_file_location("checkpoint", {source!r})
checkpoint = importlib.util.module_from_spec(spec)
spec.loader.exec_module(checkpoint)
for step in range(1, 10**6):
    with checkpoint.complete_folder(checkpoint.step_folder({root!r}, step)) as folder:
        for name in "abc":
            (folder / name).write_bytes(random.randbytes(100_000))
    print(step, flush=True)
    checkpoint.prune({root!r}, 3)
"""


def test_kill_at_any_time_leaves_a_complete_checkpoint(tmp_path):
    """SIGKILL at 20 random times: what was reported as saved is there, nothing half-written is."""
    chance = random.Random(0)
    for turn in range(20):
        root = tmp_path / str(turn)
        script = WRITER.format(source=files.__file__, root=str(root))
        command = [sys.executable, "-c", script]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as child:
            child.stdout.readline()
            time.sleep(chance.uniform(0, 0.08))
            child.kill()
            reported = [1, *map(int, child.stdout.read().split())][-1]
        found = latest_checkpoint(root)
        assert found is not None
        assert files.step_of(found) in (reported, reported + 1)
        newest = max(root.glob("step-*"), key=files.step_of)
        assert newest == found, "a visible checkpoint was incomplete"
