# SPDX-License-Identifier: Apache-2.0
"""Texts in files of rows, and files that are no text."""

import bz2
import gzip
import json
import lzma
import zipfile

import pytest

from unipool.data.corpus import path_documents
from unipool.errors import InputError

pytestmark = pytest.mark.any_device
HELLO = [b"hello", b"you, \xe2\x80\x9ctoo\xe2\x80\x9d\nand more"]
ROWS = [{"text": text.decode(), "id": number} for number, text in enumerate(HELLO)]
FILES = {
    "list.json": json.dumps(ROWS),
    "lines.json": "\n".join(map(json.dumps, ROWS)),
    "lines.jsonl": "\n".join(map(json.dumps, ROWS)) + "\n\n",
    "comma.csv": 'id,text\n0,hello\n1,"you, “too”\nand more"\n',
    "tab.TSV": 'id\ttext\r\n0\thello\r\n1\t"you, “too”\nand more"\r\n',
}


def texts(*paths, field="text"):
    return [document.text for document in path_documents(list(paths), field)]


@pytest.mark.parametrize("mark", ["", "\ufeff"])
@pytest.mark.parametrize("name", FILES)
def test_rows_are_documents(name, mark, tmp_path):
    path = tmp_path / name
    path.write_bytes((mark + FILES[name]).encode())
    assert texts(path) == HELLO
    assert texts(tmp_path) == HELLO


def test_one_object_is_one_document(tmp_path):
    (tmp_path / "one.json").write_text(json.dumps({"body": "hello"}, indent=1))
    assert texts(tmp_path / "one.json", field="body") == [b"hello"]


@pytest.mark.parametrize("name", ["package.json", "table.csv", "list.json"])
def test_in_a_folder_a_file_without_the_field_is_a_text(name, tmp_path):
    content = {"package.json": b'{"name": "a"}', "table.csv": b"a,b\n1,2\n", "list.json": b"[1, 2]"}
    (tmp_path / name).write_bytes(content[name])
    assert texts(tmp_path) == [content[name]]
    with pytest.raises(InputError, match=r"has no (field|column) 'text'|must be a JSON object"):
        texts(tmp_path / name)


PACKED = {
    "gzip": gzip.compress(b"hello"),
    "bzip2": bz2.compress(b"hello"),
    "xz": lzma.compress(b"hello"),
    "zstd": b"\x28\xb5\x2f\xfd" + b"hello",
    "Parquet": b"PAR1hello",
    "Arrow": b"ARROW1\0\0",
    "zip archive": None,
}


@pytest.mark.parametrize("suffix", [".txt", ".json", ".jsonl", ".csv", ".json.gz", ".parquet"])
@pytest.mark.parametrize("kind", PACKED)
def test_what_is_no_text_says_what_it_is(kind, suffix, tmp_path):
    path = tmp_path / f"data{suffix}"
    path.write_bytes(PACKED[kind] or b"")
    if kind == "zip archive":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("a.txt", "hello")
    for given in (path, tmp_path):
        with pytest.raises(InputError, match=f"{path.name}.* is .*{kind}.* first$") as error:
            texts(given)
        assert "\n" not in str(error.value)


BAD = {
    "short.csv": ("id,text\n0\n", r"short\.csv:2 must have 2 columns"),
    "quote.csv": ('id,text\n0,"hello', r"quote\.csv:2 is not CSV"),
    "empty.csv": ("id,text\n", "has no row with text"),
    "number.json": ('[{"text": 1}]', r"number\.json\[0\] field 'text' must be a string, got int"),
    "broken.json": ('[{"text": "a"}, ', r"broken\.json:1 is not JSON"),
    "digits.json": ('{"text": "a", "x": ' + "9" * 5000 + "}", r"digits\.json is not JSON"),
    "digits.jsonl": ('{"text": "a", "x": ' + "9" * 5000 + "}", r"digits\.jsonl:1 is not JSON"),
    "deep.json": ("[" * 100_000, "nested too deep"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_rows_are_one_line(name, tmp_path):
    text, message = BAD[name]
    (tmp_path / name).write_text(text)
    with pytest.raises(InputError, match=message) as error:
        texts(tmp_path / name)
    assert "\n" not in str(error.value)
