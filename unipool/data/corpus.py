# SPDX-License-Identifier: Apache-2.0
"""Documents to train on: text files, files of rows, or the standard library's own source."""

import os
import sysconfig
from collections.abc import Iterable, Iterator
from itertools import chain, islice
from pathlib import Path
from typing import NamedTuple

from unipool.data import formats
from unipool.errors import InputError

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
    """Documents of text files, of rows (`field` of each), and of folders of such files.

    Rows are in .jsonl, .ndjson, .json (a list, lines, or one object), .csv and .tsv. In a folder a
    .json, .csv or .tsv file without such a field is a text like any other. Folders are read
    recursively in name order; hidden and empty files in them are passed over.
    Raises InputError, naming the file (and line), for anything that is missing, empty or not text.
    """
    for path in paths:
        path = Path(path)
        if path.is_dir():
            files = [file for file in _walk(path) if _size(file) > 0]
            if not files:
                raise InputError(f"data: folder {path} holds no file with text")
            for file in files:
                yield from _file_documents(file, field, named=False)
        elif not path.exists():
            raise InputError(f"data: {path} does not exist")
        elif path.is_file() and _size(path) == 0:
            raise InputError(f"data: {path} is empty")
        else:
            yield from _file_documents(path, field, named=True)


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


def _file_documents(path: Path, field: str, named: bool) -> Iterator[Document]:
    """named: by the user, and not met in a folder, where a file without such rows is a text."""
    suffix = path.suffix.lower()
    try:
        if suffix in formats.JSON_LINES:
            with open(path, "rb") as lines:
                yield from _row_documents(path, field, formats.json_lines(path, lines, field))
            return
        data = path.read_bytes()
        rows = formats.rows(path, data, field) if suffix in formats.ROWS else iter(())
        try:
            first = list(islice(rows, 1))
        except InputError:
            if named:
                raise
            first = []
        if first or (named and suffix in formats.ROWS):
            yield from _row_documents(path, field, chain(first, rows))
        else:
            formats.check_text(data, str(path))
            yield Document(str(path), data.removeprefix(b"\xef\xbb\xbf"))
    except OSError as error:
        raise InputError(f"data: cannot read {path}: {error.strerror}") from error


def _row_documents(path: Path, field: str, rows: Iterable[tuple[str, bytes]]) -> Iterator[Document]:
    found = False
    for where, text in rows:
        if text:
            found = True
            yield Document(where, text)
    if not found:
        raise InputError(f"data: {path} has no row with text in field {field!r}")
