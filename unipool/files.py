# SPDX-License-Identifier: Apache-2.0
"""Folders that are complete or absent, whatever kills the process that writes them.

A folder is filled under a temporary sibling name, its files are flushed to the disk, a manifest of
their sizes and SHA-256 sums is written last, and one rename makes it visible. A reader trusts a
folder only if its manifest matches every file. Standard library only.
"""

import contextlib
import hashlib
import json
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path

MANIFEST = "manifest.json"
_STEP = re.compile(r"step-(\d+)")
_CHUNK = 1 << 20


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
    """Replace the file `path` by `text` in one step: a reader sees the old content or the new."""
    staging = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(staging, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(staging, path)
    except BaseException:
        staging.unlink(missing_ok=True)
        raise
    sync_path(path.parent)


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
    write_text(folder / MANIFEST, json.dumps({"format": 1, "files": files}, indent=1) + "\n")


@contextlib.contextmanager
def complete_folder(path: Path) -> Iterator[Path]:
    """Yield an empty folder to fill; on a clean exit it becomes `path`, otherwise it is removed.

    An older `path` is replaced. Errors while writing (OSError above all) leave `path` as it was.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    staging = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir()
    try:
        yield staging
        _seal(staging)
        if path.exists():
            replaced = path.with_name(f".{path.name}.{os.getpid()}.old.tmp")
            shutil.rmtree(replaced, ignore_errors=True)
            os.rename(path, replaced)
            os.rename(staging, path)
            shutil.rmtree(replaced, ignore_errors=True)
        else:
            os.rename(staging, path)
        sync_path(path.parent)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise


def folder_fault(path: Path, checksums: bool = True) -> str | None:
    """Why the folder `path` must not be used, in a few words; None if it is complete and intact.

    Without `checksums` only presence and sizes are checked, which does not read the files.
    """
    path = Path(path)
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        files = manifest["files"]
        if manifest["format"] != 1 or not isinstance(files, dict):
            return f"{MANIFEST} has an unknown format"
        for name, entry in files.items():
            if not (path / name).is_file():
                return f"{name} is missing"
            size = (path / name).stat().st_size
            if size != entry["size"]:
                return f"{name} has {size} bytes instead of {entry['size']}"
            if checksums and _sha256(path / name) != entry["sha256"]:
                return f"{name} does not match its checksum"
    except FileNotFoundError:
        return f"{MANIFEST} is missing"
    except OSError as error:
        return f"{error.strerror or error}"
    except (ValueError, KeyError, TypeError, AttributeError):
        return f"{MANIFEST} is damaged"
    return None


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
    folder: Path, passed_over: Callable[[Path, str], None] | None = None
) -> Path | None:
    """Newest complete `step-N` in `folder`, or None; tells `passed_over` of newer, faulty ones."""
    for path in _by_step(folder):
        fault = folder_fault(path)
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
            shutil.rmtree(path, ignore_errors=True)
        elif folder_fault(path, checksums=False) is None:
            kept += 1


def remove_leftovers(folder: Path, older_than: float = 0.0) -> None:
    """Remove what killed writers left in `folder`, if untouched for `older_than` seconds."""
    if not Path(folder).is_dir():
        return
    for path in Path(folder).glob(".*.tmp"):
        with contextlib.suppress(OSError):
            if time.time() - path.stat().st_mtime >= older_than:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
