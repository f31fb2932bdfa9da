# SPDX-License-Identifier: Apache-2.0
"""Files and folders where others write, too: processes of the same number, planted links, races."""

import multiprocessing
import os
from dataclasses import replace
from pathlib import Path

import pytest

from unipool.errors import InputError
from unipool.files import complete_folder, folder_fault, open_own, write_bytes, write_text

pytest.importorskip("transformers")


@pytest.fixture
def same_number(monkeypatch):
    """Two machines may give the same number to the processes that share a disk."""
    monkeypatch.setattr(os, "getpid", lambda: 4711)


@pytest.mark.usefixtures("same_number")
def test_two_writers_of_a_folder_do_not_share_a_temporary_one(tmp_path):
    path = tmp_path / "folder"
    with complete_folder(path) as first:
        (first / "name").write_text("first")
        with complete_folder(path) as second:
            (second / "name").write_text("second")
        assert (path / "name").read_text() == "second"
        assert first.is_dir()
    assert (path / "name").read_text() == "first"
    assert folder_fault(path) is None
    assert [p.name for p in tmp_path.iterdir()] == ["folder"]


def test_the_loser_of_a_race_takes_what_the_winner_wrote(tmp_path):
    path = tmp_path / "folder"
    with complete_folder(path, keep=lambda p: folder_fault(p) is None) as late:
        (late / "name").write_text("late")
        with complete_folder(path) as winner:
            (winner / "name").write_text("winner")
    assert (path / "name").read_text() == "winner"
    (path / "name").write_text("damaged")
    with complete_folder(path, keep=lambda p: folder_fault(p) is None) as again:
        (again / "name").write_text("again")
    assert (path / "name").read_text() == "again"
    assert [p.name for p in tmp_path.iterdir()] == ["folder"]


def test_what_came_meanwhile_is_not_lost_where_it_must_not_be_replaced(tmp_path):
    path = tmp_path / "folder"

    def write_late():
        with complete_folder(path, replace=False) as late:
            (late / "name").write_text("late")
            path.mkdir()
            (path / "notes").write_text("mine")

    with pytest.raises(FileExistsError):
        write_late()
    assert (path / "notes").read_text() == "mine"
    (path / "notes").unlink()
    with complete_folder(path, replace=False) as staging:
        (staging / "name").write_text("into an empty folder")
    assert [p.name for p in tmp_path.iterdir()] == ["folder"]


@pytest.mark.parametrize("kind", ["file", "link", "dangling"])
def test_a_file_or_a_link_in_the_place_of_a_folder_is_replaced(tmp_path, kind):
    path, other = tmp_path / "folder", tmp_path / "other"
    other.mkdir()
    (other / "mine").write_text("mine")
    if kind == "file":
        path.write_text("")
    else:
        path.symlink_to(other if kind == "link" else tmp_path / "nowhere")
    with complete_folder(path) as staging:
        (staging / "name").write_text("new")
    assert folder_fault(path) is None
    assert not path.is_symlink()
    assert (other / "mine").read_text() == "mine"


def test_a_rename_that_fails_puts_the_old_folder_back(tmp_path, monkeypatch):
    path = tmp_path / "folder"
    with complete_folder(path) as staging:
        (staging / "name").write_text("old")
    usual = os.rename

    def rename(source, target):
        if Path(source).name == "new" and not path.exists():
            raise OSError(5, "Input/output error")
        usual(source, target)

    def write_new():
        with complete_folder(path) as staging:
            (staging / "name").write_text("new")
            monkeypatch.setattr(os, "rename", rename)

    with pytest.raises(OSError, match="Input/output"):
        write_new()
    assert (path / "name").read_text() == "old"
    assert folder_fault(path) is None


def write_many(path: str, number: int) -> None:
    for turn in range(30):
        with complete_folder(Path(path)) as staging:
            (staging / "name").write_text(f"{number} {turn}" * 100)
        write_text(Path(path).with_name("file"), f"{number}\n" * 1000)


def test_processes_at_the_same_names_leave_whole_ones(tmp_path):
    context = multiprocessing.get_context("spawn")
    arguments = [(str(tmp_path / "folder"), number) for number in range(3)]
    writers = [context.Process(target=write_many, args=each) for each in arguments]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert [writer.exitcode for writer in writers] == [0, 0, 0]
    assert folder_fault(tmp_path / "folder") is None
    assert len(set((tmp_path / "file").read_text().splitlines())) == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "folder"]


@pytest.mark.usefixtures("same_number")
def test_a_planted_link_is_not_written_through(tmp_path):
    victim = tmp_path / "victim"
    victim.write_text("mine")
    for name in (".config.json.4711.tmp", "config.json"):
        (tmp_path / name).symlink_to(victim)
    write_text(tmp_path / "config.json", "ours")
    write_bytes(tmp_path / "config.json", b"ours")
    assert (tmp_path / "config.json").read_bytes() == b"ours"
    for mode in ("w", "a", "r+"):
        (tmp_path / "log").unlink(missing_ok=True)
        (tmp_path / "log").symlink_to(victim)
        with pytest.raises(OSError, match="symbolic link"):
            open_own(tmp_path / "log", mode)
    assert victim.read_text() == "mine"


def test_files_are_for_whoever_the_mask_lets_read(tmp_path):
    """The temporary folder is for us alone, and what comes out of it is not."""
    before = os.umask(0o022)
    try:
        write_text(tmp_path / "file", "")
        with complete_folder(tmp_path / "folder") as staging:
            (staging / "name").write_text("")
            assert staging.parent.stat().st_mode & 0o777 == 0o700
    finally:
        os.umask(before)
    assert (tmp_path / "file").stat().st_mode & 0o777 == 0o644
    assert (tmp_path / "folder").stat().st_mode & 0o777 == 0o755


@pytest.mark.any_device
@pytest.mark.parametrize("name", [".lock", "metrics.jsonl", "config.json", "data.key"])
def test_a_run_writes_through_no_link(config, tmp_path, name):
    from unipool.training.run import run_training

    victim, out = tmp_path / "victim", Path(config.out)
    victim.write_text("")
    out.mkdir()
    run = replace(config, steps=2, eval_every=0)
    if name == "config.json":  # only a run that is there has one
        (out / name).symlink_to(victim)
        with pytest.raises(InputError, match="already holds a run"):
            run_training(run)
    else:
        victim.write_text("mine")
        (out / name).symlink_to(victim)
        message = "cannot write there" if name == ".lock" else "is not empty and holds no run"
        with pytest.raises(InputError, match=message):
            run_training(run)
    assert victim.read_text() == ("" if name == "config.json" else "mine")
