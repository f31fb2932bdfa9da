# SPDX-License-Identifier: Apache-2.0
"""Documents to train on: text files, JSON Lines files, or the standard library's own source."""

import os
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from unipool.errors import InputError
from unipool.json_files import parse_json

_JSONL = {".jsonl", ".ndjson"}
_NOT_STDLIB = {"site-packages", "dist-packages", "__pycache__"}


class Document(NamedTuple):
    """One text: where it came from, and its UTF-8 bytes."""

    name: str
    text: bytes


def stdlib_documents(root: Path | None = None) -> Iterator[Document]:
    """Source files of Python's standard library, sorted by name; skips what is not UTF-8.

    About 30 MB where the library's own tests are installed; some distributions leave them out.
    """
    root = Path(root or sysconfig.get_path("stdlib"))
    found = False
    for path in _walk(root, skip=_NOT_STDLIB):
        if path.suffix != ".py":
            continue
        try:
            text = path.read_bytes()
            text.decode("utf-8")
        except (OSError, UnicodeDecodeError):
            continue
        if text:
            found = True
            yield Document(path.relative_to(root).as_posix(), text)
    if not found:
        raise InputError(f"data: no Python source under {root}; pass --data with text of your own")


def path_documents(paths: list[Path], field: str = "text") -> Iterator[Document]:
    """Documents of text files, of JSON Lines files (`field` of each line), and of folders of them.

    Folders are read recursively in name order; hidden and empty files in them are passed over.
    Raises InputError, naming the file (and line), for anything that is missing, empty or not text.
    """
    for path in paths:
        path = Path(path)
        if path.is_dir():
            files = [file for file in _walk(path) if _size(file) > 0]
            if not files:
                raise InputError(f"data: folder {path} holds no file with text")
            for file in files:
                yield from _file_documents(file, field)
        elif not path.exists():
            raise InputError(f"data: {path} does not exist")
        elif path.is_file() and _size(path) == 0:
            raise InputError(f"data: {path} is empty")
        else:
            yield from _file_documents(path, field)


def _walk(root: Path, skip: frozenset[str] | set[str] = frozenset()) -> Iterator[Path]:
    for folder, names, files in os.walk(root):
        names[:] = sorted(n for n in names if n not in skip and not n.startswith("."))
        for name in sorted(files):
            if not name.startswith("."):
                yield Path(folder, name)


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError as error:
        raise InputError(f"data: cannot read {path}: {error.strerror}") from error


def _file_documents(path: Path, field: str) -> Iterator[Document]:
    try:
        if path.suffix.lower() in _JSONL:
            yield from _jsonl_documents(path, field)
        else:
            text = path.read_bytes()
            _check_utf8(text, str(path))
            yield Document(str(path), text.removeprefix(b"\xef\xbb\xbf"))
    except OSError as error:
        raise InputError(f"data: cannot read {path}: {error.strerror}") from error


def _jsonl_documents(path: Path, field: str) -> Iterator[Document]:
    found = False
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            where = f"{path}:{number}"
            _check_utf8(line, where)
            if not line.strip():
                continue
            text = _jsonl_text(line, where, field)
            if text:
                found = True
                yield Document(where, text)
    if not found:
        raise InputError(f"data: {path} has no line with text in field {field!r}")


def _jsonl_text(line: bytes, where: str, field: str) -> bytes:
    try:
        row = parse_json(line.decode("utf-8"), ours=False)
    except ValueError as error:
        raise InputError(f"data: {where} is not JSON: {error}") from error
    if not isinstance(row, dict):
        raise InputError(f"data: {where} must be a JSON object, got {type(row).__name__}")
    if field not in row:
        names = ", ".join(list(row)[:8]) or "none"
        raise InputError(f"data: {where} has no field {field!r} (fields: {names}); see --field")
    if not isinstance(row[field], str):
        got = type(row[field]).__name__
        raise InputError(f"data: {where} field {field!r} must be a string, got {got}")
    try:
        return row[field].encode("utf-8")
    except UnicodeEncodeError as error:
        raise InputError(f"data: {where} field {field!r} is not valid Unicode: {error}") from error


def _check_utf8(text: bytes, where: str) -> None:
    try:
        text.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"data: {where} is not UTF-8 text (byte {error.start})") from error
