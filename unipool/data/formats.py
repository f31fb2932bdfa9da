# SPDX-License-Identifier: Apache-2.0
"""Texts in files of rows (JSON, JSON Lines, CSV), and what a file that is no text is."""

import csv
import io
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from unipool.errors import InputError
from unipool.json_files import parse_json

JSON_LINES = {".jsonl", ".ndjson"}
TABLES = {".csv": ",", ".tsv": "\t"}
ROWS = {".json", *TABLES}
# First bytes of what people have texts in that we do not unpack.
_MAGIC = {
    b"\x1f\x8b": "compressed with gzip: unpack it first",
    b"BZh": "compressed with bzip2: unpack it first",
    b"\xfd7zXZ\x00": "compressed with xz: unpack it first",
    b"\x28\xb5\x2f\xfd": "compressed with zstd: unpack it first",
    b"PK\x03\x04": "a zip archive: unpack it first",
    b"PAR1": "Parquet: write it as JSON Lines first",
    b"ARROW1": "Arrow: write it as JSON Lines first",
    b"SQLite format 3\x00": "a database: write its texts as JSON Lines first",
}


def check_text(data: bytes, where: str) -> None:
    """InputError, saying what it is if that shows, for bytes that are not UTF-8 text."""
    for magic, kind in _MAGIC.items():
        if data.startswith(magic):
            raise InputError(f"data: {where} is {kind}")
    try:
        data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"data: {where} is not UTF-8 text (byte {error.start})") from error


def json_lines(path: Path, lines: Iterable[bytes], field: str) -> Iterator[tuple[str, bytes]]:
    """(place, text) of each line that has one. InputError, naming the line, for what is no row."""
    for number, line in enumerate(lines, start=1):
        where = f"{path}:{number}"
        check_text(line, where)
        if line.strip():
            yield where, _field(_parsed(line, where), where, field)


def rows(path: Path, data: bytes, field: str) -> Iterator[tuple[str, bytes]]:
    """As json_lines, of a .json, .csv or .tsv file, whose bytes are `data`."""
    return (_table if path.suffix.lower() in TABLES else _json_file)(path, data, field)


def _json_file(path: Path, data: bytes, field: str) -> Iterator[tuple[str, bytes]]:
    """Of a list of objects, JSON Lines, or one object."""
    check_text(data, str(path))
    try:
        value = parse_json(data.decode("utf-8-sig"), ours=False)
    except json.JSONDecodeError:
        yield from json_lines(path, io.BytesIO(data), field)
        return
    except ValueError as error:
        raise InputError(f"data: {path} is not JSON: {error}") from error
    if not isinstance(value, list):
        yield str(path), _field(value, str(path), field)
        return
    for number, row in enumerate(value):
        yield f"{path}[{number}]", _field(row, f"{path}[{number}]", field)


def _table(path: Path, data: bytes, field: str) -> Iterator[tuple[str, bytes]]:
    """Of a file whose first row names its columns."""
    check_text(data, str(path))
    lines = io.StringIO(data.decode("utf-8-sig"), newline="")
    reader = csv.reader(lines, delimiter=TABLES[path.suffix.lower()], strict=True)
    try:
        names = next(reader, [])
        if field not in names:
            raise InputError(
                f"data: {path} has no column {field!r} (columns: {', '.join(names[:8]) or 'none'})"
                "; see --field"
            )
        column = names.index(field)
        for row in reader:
            where = f"{path}:{reader.line_num}"
            if row and len(row) != len(names):
                raise InputError(
                    f"data: {where} must have {len(names)} columns as the first row, got {len(row)}"
                )
            if row:
                yield where, row[column].encode("utf-8")
    except csv.Error as error:
        raise InputError(f"data: {path}:{reader.line_num} is not CSV: {error}") from error


def _parsed(line: bytes, where: str) -> Any:
    try:
        return parse_json(line.decode("utf-8-sig"), ours=False)
    except ValueError as error:
        raise InputError(f"data: {where} is not JSON: {error}") from error


def _field(row: Any, where: str, field: str) -> bytes:
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
