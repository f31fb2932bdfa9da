# SPDX-License-Identifier: Apache-2.0
"""Folders that are complete or absent, whatever kills the process that writes them.

A folder is filled in a temporary one beside it, its files are flushed to the disk, a manifest of
their sizes and SHA-256 sums is written last, and one rename makes it visible. A reader trusts a
folder only if its manifest matches every file. Temporary names are drawn by the system, so that
nobody knows them before, and two processes with the same number on a shared disk never meet.
Standard library only.
"""

import contextlib
import errno
import hashlib
import json
import os
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

MANIFEST = "manifest.json"
_FORMAT = 1  # of a manifest
_STEP = re.compile(r"step-(0|[1-9][0-9]{0,17})")
_CHUNK = 1 << 20
_TRIES = 100  # to put a folder in its place, while other processes put theirs there


def sync_path(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def _files(folder: Path) -> list[Path]:
    return sorted(p for p in folder.rglob("*") if p.is_file() and p != folder / MANIFEST)


def write_text(path: Path, text: str) -> None:
    """As write_bytes, of text as UTF-8."""
    write_bytes(path, text.encode("utf-8"))


def write_bytes(path: Path, content: bytes) -> None:
    """Replace the file `path` in one step: a reader sees the old content or the new.

    Where `path` is a link, the link is replaced, and not the file that it leads to.
    """
    path = Path(path)
    with _aside(path) as aside:
        staging = aside / path.name
        with open(staging, "xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(staging, path)
    sync_path(path.parent)


def open_own(path: Path, mode: str) -> IO:
    """open(path, mode) for writing text; OSError where `path` is a link, which may lead anywhere.

    For files that stay open while they are written: "w", "a", or "r+" for one that may be new.
    """
    flags = {"w": os.O_TRUNC, "a": os.O_APPEND, "r+": 0}[mode]
    access = os.O_RDWR if mode == "r+" else os.O_WRONLY
    follow = getattr(os, "O_NOFOLLOW", None)
    if follow is None and os.path.islink(path):  # the best that such a system can do
        raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), str(path))
    flags |= (follow or 0) | getattr(os, "O_CLOEXEC", 0)
    handle = os.open(path, access | os.O_CREAT | flags, 0o666)
    return open(handle, mode, encoding="utf-8")


@contextlib.contextmanager
def _aside(path: Path) -> Iterator[Path]:
    """A folder beside `path` that nobody else knows, removed at the end."""
    folder = Path(tempfile.mkdtemp(prefix=".", suffix=".tmp", dir=path.parent))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _seal(folder: Path) -> None:
    """Flush every file of `folder`, then write and flush the manifest that vouches for them."""
    files = {}
    for path in _files(folder):
        sync_path(path)
        name = path.relative_to(folder).as_posix()
        files[name] = {"size": path.stat().st_size, "sha256": _sha256(path)}
    for path in folder.rglob("*"):
        if path.is_dir():
            sync_path(path)
    write_text(folder / MANIFEST, json.dumps({"format": _FORMAT, "files": files}, indent=1) + "\n")


@contextlib.contextmanager
def complete_folder(
    path: Path, *, replace: bool = True, keep: Callable[[Path], bool] | None = None
) -> Iterator[Path]:
    """Yield an empty folder to fill; on a clean exit it becomes `path`, otherwise it is removed.

    An older `path`, or one that another process finished meanwhile, is replaced. With
    replace=False that is FileExistsError, unless it is an empty folder. keep: whether what is there
    will do; then it stays, and ours goes. Errors while writing (OSError above all) leave `path` as
    it was.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with _aside(path) as aside:
        staging = aside / "new"
        staging.mkdir()
        yield staging
        _seal(staging)
        for turn in range(_TRIES):
            if _put(staging, path, aside / f"old-{turn}", replace, keep):
                break
        else:
            raise OSError(errno.EBUSY, "other processes keep replacing it", str(path))
    sync_path(path.parent)


def _put(staging: Path, path: Path, old: Path, replace: bool, keep) -> bool:
    """Rename `staging` to `path`, and what is there to `old`; False if another came between."""
    if _rename_to_free(staging, path):
        return True
    if keep is not None and keep(path):
        return True
    if not replace:
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path))
    try:
        os.rename(path, old)
    except FileNotFoundError:
        return False
    try:
        return _rename_to_free(staging, path)
    except OSError:
        _rename_to_free(old, path)
        raise


def _rename_to_free(folder: Path, path: Path) -> bool:
    """Whether the rename took place: `path` was free, or an empty folder."""
    try:
        os.rename(folder, path)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
            raise
        return False
    return True


def remove(path: Path) -> None:
    """A file, a folder, or a link itself, as far as that is possible."""
    with contextlib.suppress(OSError):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def folder_fault(path: Path, checksums: bool = True) -> str | None:
    """Why the folder `path` must not be used, in a few words; None if it is complete and intact.

    Files must be those of the manifest; names that begin with a dot do not count. Without
    `checksums` only presence and sizes are checked, which does not read the files.
    """
    path = Path(path)
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        if fault := _manifest_fault(manifest):
            return f"{MANIFEST} {fault}"
        files = manifest["files"]
        for name, entry in files.items():
            if not (path / name).is_file():
                return f"{name} is missing"
            size = (path / name).stat().st_size
            if size != entry["size"]:
                return f"{name} has {size} bytes instead of {entry['size']}"
            if checksums and _sha256(path / name) != entry["sha256"]:
                return f"{name} does not match its checksum"
        found = (file.relative_to(path).as_posix() for file in _files(path))
        if more := [name for name in found if name not in files and not _is_hidden(name)]:
            return f"{more[0]} is not listed in {MANIFEST}"
    except FileNotFoundError:
        return f"{MANIFEST} is missing"
    except OSError as error:
        return f"{error.strerror or error}"
    except (ValueError, RecursionError):
        return f"{MANIFEST} is damaged"
    return None


def _manifest_fault(manifest) -> str | None:
    """What is wrong with the content of a manifest, whatever it is."""
    if not isinstance(manifest, dict) or type(manifest.get("format")) is not int:
        return "is damaged"
    if manifest["format"] != _FORMAT:
        return f"has format {manifest['format']}, and not {_FORMAT}"
    files = manifest.get("files")
    if not isinstance(files, dict) or set(manifest) != {"format", "files"}:
        return "is damaged"
    for name, entry in files.items():
        if not isinstance(entry, dict) or set(entry) != {"size", "sha256"}:
            return "is damaged"
        if type(entry["size"]) is not int or not isinstance(entry["sha256"], str):
            return "is damaged"
        if not name or name.startswith("/") or {"", ".", ".."} & set(name.split("/")):
            return "names a file outside the folder"
    return None if files else "lists no file"


def _is_hidden(name: str) -> bool:
    return any(part.startswith(".") for part in name.split("/"))


def step_of(path: Path) -> int:
    """Step number in a checkpoint's folder name (`step-120` -> 120); -1 for any other name."""
    match = _STEP.fullmatch(Path(path).name)
    return int(match.group(1)) if match else -1


def step_folder(folder: Path, step: int) -> Path:
    return Path(folder) / f"step-{step}"


def _by_step(folder: Path) -> list[Path]:
    if not Path(folder).is_dir():
        return []
    found = [p for p in Path(folder).iterdir() if p.is_dir() and step_of(p) >= 0]
    return sorted(found, key=step_of, reverse=True)


def latest_checkpoint(
    folder: Path,
    passed_over: Callable[[Path, str], None] | None = None,
    fault_of: Callable[[Path], str | None] = folder_fault,
) -> Path | None:
    """Newest complete `step-N` in `folder`, or None; tells `passed_over` of newer, faulty ones."""
    for path in _by_step(folder):
        fault = fault_of(path)
        if fault is None:
            return path
        if passed_over is not None:
            passed_over(path, fault)
    return None


def prune(folder: Path, keep: int) -> None:
    """Delete all but the newest `keep` checkpoints; an incomplete one does not count as kept."""
    kept = 0
    for path in _by_step(folder):
        if kept >= keep:
            remove(path)  # of a link only the link: what it leads to is not ours to delete
        elif folder_fault(path, checksums=False) is None:
            kept += 1


def remove_leftovers(folder: Path, older_than: float = 0.0) -> None:
    """Remove what killed writers left in `folder`, if untouched for `older_than` seconds.

    What was touched as far in the future is left over, too, from before the clock was set back.
    """
    if not Path(folder).is_dir():
        return
    for path in Path(folder).glob(".*.tmp"):
        with contextlib.suppress(OSError):
            if older_than <= 0 or abs(time.time() - _last_touched(path)) >= older_than:
                remove(path)


def _last_touched(path: Path) -> float:
    """Of a folder, also its files: writing to one does not touch the folder."""
    inside = path.rglob("*") if path.is_dir() and not path.is_symlink() else ()
    return max(one.lstat().st_mtime for one in (path, *inside))
