# SPDX-License-Identifier: Apache-2.0
"""The order of flushes and renames that lets a crash of the machine leave the old or the new."""

import os
from pathlib import Path

import pytest

from unipool.files import MANIFEST, complete_folder, folder_fault, write_bytes

pytestmark = pytest.mark.any_device


class Calls:
    """Every fsync and rename, in order: ("fsync", path, size) and ("rename", from, to)."""

    def __init__(self, monkeypatch):
        self.seen: list[tuple] = []
        fsync = os.fsync

        def recorded_fsync(handle):
            handle = handle if isinstance(handle, int) else handle.fileno()
            fsync(handle)
            path = Path(os.readlink(f"/proc/self/fd/{handle}"))
            self.seen.append(("fsync", path, os.fstat(handle).st_size))

        monkeypatch.setattr(os, "fsync", recorded_fsync)
        for name in ("rename", "replace"):
            monkeypatch.setattr(os, name, self._recorded(getattr(os, name)))

    def _recorded(self, usual):
        def rename(source, target, **options):
            usual(source, target, **options)
            self.seen.append(("rename", Path(source), Path(target)))

        return rename

    def fsyncs(self, path) -> list[int]:
        return [i for i, (call, at, _) in enumerate(self.seen) if (call, at) == ("fsync", path)]

    def rename(self, target) -> int:
        (index,) = [i for i, c in enumerate(self.seen) if c[0] == "rename" and c[2] == target]
        return index


@pytest.fixture
def calls(monkeypatch):
    if not Path("/proc/self/fd").is_dir():
        pytest.skip("needs the paths of open files")
    return Calls(monkeypatch)


def check_file(calls, path, size):
    """Its whole content is on the disk before it gets its name, and its name after that."""
    index = calls.rename(path)
    flushed = calls.seen[calls.fsyncs(calls.seen[index][1])[-1]]
    assert calls.fsyncs(calls.seen[index][1])[-1] < index
    assert flushed[2] == size
    assert any(i > index for i in calls.fsyncs(path.parent))
    return index


@pytest.mark.parametrize("old", [None, b"old"])
@pytest.mark.parametrize("size", [3, 1 << 20])
def test_a_file_is_flushed_then_renamed_then_its_folder_is_flushed(tmp_path, calls, old, size):
    path = tmp_path / "config.json"
    if old is not None:
        path.write_bytes(old)
    write_bytes(path, b"x" * size)
    check_file(calls, path, size)
    assert path.read_bytes() == b"x" * size


CONTENT = {"weights.bin": 300_000, "state.json": 17, "sub/more.bin": 5, "sub/deep/last": 1}


def fill(folder):
    for name, size in CONTENT.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"x" * size)
    (folder / "bare").mkdir()


@pytest.mark.parametrize("replaced", [False, True], ids=["new", "replaced"])
def test_a_folder_is_flushed_whole_before_it_has_its_name(tmp_path, calls, replaced):
    path = tmp_path / "step-1"
    if replaced:
        with complete_folder(path) as folder:
            (folder / "old").write_bytes(b"old")
        calls.seen.clear()
    with complete_folder(path) as folder:
        fill(folder)
        assert calls.seen == []
        staging = folder
    assert folder_fault(path) is None
    visible = calls.rename(path)
    assert calls.seen[visible][1] == staging
    vouched = check_file(calls, staging / MANIFEST, (path / MANIFEST).stat().st_size)
    for name, size in CONTENT.items():
        (index,) = calls.fsyncs(staging / name)
        assert calls.seen[index][2] == size
        assert index < vouched, "the manifest may vouch only for what is on the disk"
    for name in ("sub", "sub/deep", "bare"):
        assert any(i < vouched for i in calls.fsyncs(staging / name)), name
    assert any(vouched < i < visible for i in calls.fsyncs(staging)), "names of the folder's files"
    assert calls.fsyncs(tmp_path)[-1] > visible, "the folder's own name"
    moved = [i for i, c in enumerate(calls.seen) if c[0] == "rename" and c[1] == path]
    assert [calls.fsyncs(staging)[-1] < i < visible for i in moved] == [True] * replaced
