# SPDX-License-Identifier: Apache-2.0
"""Token files in a cache that others may write to: only what we would write is read."""

import json

import numpy as np
import pytest

from unipool.data import tokens
from unipool.data.tokenizer import ByteTokenizer
from unipool.data.tokens import load_data
from unipool.files import complete_folder, folder_fault


@pytest.fixture
def load(text, tmp_path):
    return lambda: load_data([text], ByteTokenizer(), cache=tmp_path)


@pytest.fixture
def folder(load, tmp_path):
    load()
    (found,) = (tmp_path / "tokens").iterdir()
    return found


def forge(folder, change):
    """`change` to the files, under a manifest that vouches for them."""
    contents = {path.name: path.read_bytes() for path in folder.iterdir()}
    del contents["manifest.json"]
    with complete_folder(folder) as staging:
        for name, content in contents.items():
            (staging / name).write_bytes(content)
        change(staging)
    assert folder_fault(folder) is None


def meta(**changes):
    def change(staging):
        values = json.loads((staging / "meta.json").read_text()) | changes
        values = {name: value for name, value in values.items() if value != "left out"}
        (staging / "meta.json").write_text(json.dumps(values))

    return change


def text_of_meta(text):
    return lambda staging: (staging / "meta.json").write_text(text)


def longer(staging):
    with open(staging / "train.bin", "ab") as file:
        file.write(b"\0")


def past_the_vocabulary(staging):
    ids = np.fromfile(staging / "val.bin", dtype="<u2")
    ids[3] = 320
    ids.tofile(staging / "val.bin")


FORGED = {
    "object": meta(dtype="|O"),
    "structure": meta(dtype="<u2,<u2"),
    "signed": meta(dtype="<i2"),
    "wider": meta(dtype="<u4"),
    "list": meta(dtype=[["a", "|O"]]),
    "dtype gone": meta(dtype="left out"),
    "number": meta(dtype=2),
    "other key": meta(key="0" * 64),
    "vocabulary": meta(vocab_size=10),
    "no vocabulary": meta(vocab_size=None),
    "separator": meta(separator=3),
    "negative": meta(train_tokens=-1),
    "none": meta(train_tokens=0),
    "more": meta(val_tokens=1 << 40),
    "huge": meta(val_tokens=1 << 70),
    "fraction": meta(val_tokens=1.5),
    "truth": meta(val_documents=True),
    "text": meta(val_bytes="many"),
    "bytes gone": meta(val_bytes="left out"),
    "unknown": meta(more=1),
    "empty": text_of_meta(""),
    "list of it": text_of_meta("[]"),
    "deep": text_of_meta("[" * 100_000),
    "digits": text_of_meta('{"key": ' + "9" * 5000 + "}"),
    "no text": lambda staging: (staging / "meta.json").write_bytes(b"\xff\xfe"),
    "no meta": lambda staging: (staging / "meta.json").unlink(),
    "no tokens": lambda staging: (staging / "val.bin").unlink(),
    "longer": longer,
    "ids": past_the_vocabulary,
}


@pytest.mark.parametrize("name", FORGED)
def test_a_forged_cache_is_made_anew(load, folder, name):
    before = load()
    forge(folder, FORGED[name])
    after = load()
    for split in ("train", "val"):
        assert np.array_equal(getattr(after, split), getattr(before, split))
    same = ("key", "train_bytes", "val_bytes", "vocab_size", "separator", "val_documents")
    assert [getattr(after, field) for field in same] == [getattr(before, field) for field in same]
    assert json.loads((folder / "meta.json").read_text())["dtype"] == "<u2"


def test_a_sound_cache_is_not_made_anew(load, folder, monkeypatch):
    monkeypatch.setattr(tokens, "complete_folder", None)
    load()


def test_a_lost_race_takes_the_files_of_the_winner(load, folder, monkeypatch):
    """Another process finishes while ours still writes."""
    kept = folder.rename(folder.with_name("aside"))
    usual = ByteTokenizer.encode

    def encode(self, texts):
        if kept.exists():
            kept.rename(folder)
        return usual(self, texts)

    monkeypatch.setattr(ByteTokenizer, "encode", encode)
    inode = kept.stat().st_ino
    load()
    assert folder.stat().st_ino == inode
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]
