# SPDX-License-Identifier: Apache-2.0
"""Paths of any bytes: text and results may lie there, models may not, and one line says so."""

import json
import os
import shutil

import pytest
from model_folders import write_model

pytest.importorskip("typer")
pytest.importorskip("transformers")

from unipool import cli

pytestmark = pytest.mark.usefixtures("small_scale")

SMALL = ["--d-model=16", "--d-ff=8", "--layers=1", "--heads=2", "--kv-heads=1", "--pool-size=2"]
SMALL += ["--seq-len=16", "--batch-size=2", "--steps=1", "--eval-tokens=32", "--device=cpu"]


@pytest.fixture
def odd(tmp_path):
    """A folder whose name is no UTF-8."""
    folder = tmp_path / os.fsdecode(b"caf\xe9 \xff")
    try:
        folder.mkdir()
    except OSError:
        pytest.skip("this file system takes only UTF-8")
    return folder


def write_text(folder):
    (folder / os.fsdecode(b"\xe9.txt")).write_text("the cold river under a green stone\n" * 60)
    return f"--data={folder}"


def one_error(capsys, *command):
    assert cli.main(list(command)) in (1, 2)
    error = capsys.readouterr().err
    assert error.count("\n") == 1, error
    assert "error of UniPool" not in error
    return error


def test_text_and_results_may_lie_there(odd, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("UNIPOOL_CACHE", str(odd / "cache"))
    run = str(tmp_path / "run")
    (odd / "text").mkdir()
    assert cli.main(["train", write_text(odd / "text"), f"--out={run}", *SMALL]) == 0
    assert cli.main(["train", "--resume", f"--out={run}", "--steps=2"]) == 0
    look = ["--tokens=32", "--device=cpu"]
    assert cli.main(["analyze", run, f"--out={odd / 'report'}", "--shuffles=1", *look]) == 0
    assert (
        cli.main(["analyze", run, write_text(odd / "text"), f"--out={tmp_path / 'report'}", *look])
        == 0
    )
    files = [f"--json={odd / 'a.json'}", f"--plot={odd / 'a.png'}"]
    assert cli.main(["probe", run, "--seeds=1", *files, *look]) == 0
    (odd / "options.json").write_text('{"max-new-tokens": 1, "device": "cpu"}')
    assert cli.main(["generate", run, f"--config={odd / 'options.json'}"]) == 0
    assert json.loads((odd / "a.json").read_text())["tokens"] > 0
    assert "caf\\xe9 \\xff" in (tmp_path / "report" / "report.html").read_text()
    capsys.readouterr().out.encode("utf-8")


@pytest.mark.parametrize(
    "command",
    [
        ["train", "TEXT", "--out=ODD/run", *SMALL],
        ["train", "TEXT", "--out=OUT", "--tokenizer=ODD/model", *SMALL],
        ["compare", "TEXT", "--out=ODD/sweep", "--pools=1", *SMALL[6:]],
        ["demo", "--out=ODD/demo", "--steps=1"],
        ["generate", "ODD/model"],
        ["eval", "ODD/model"],
        ["probe", "ODD/model", "TEXT"],
        ["analyze", "ODD/model", "TEXT"],
        ["convert", "ODD/model", "OUT", "--to=private"],
        ["convert", "MODEL", "ODD/out", "--to=private", "--untie"],
        ["resize", "MODEL", "ODD/out", "--experts=6"],
    ],
    ids=lambda command: command[0],
)
def test_models_may_not(odd, tmp_path, capsys, command):
    model = write_model(tmp_path / "model")
    shutil.copytree(model, odd / "model")  # a link there would lead to a path in UTF-8
    places = {"ODD": str(odd), "OUT": str(tmp_path / "out"), "MODEL": str(model)}
    (tmp_path / "text").mkdir()
    places["TEXT"] = write_text(tmp_path / "text")
    given = command
    for name, place in places.items():
        given = [option.replace(name, place) for option in given]
    assert "must be a path in UTF-8" in one_error(capsys, *given)
    assert not (tmp_path / "out").exists()


LONG = "x" * 300


@pytest.mark.parametrize(
    "command",
    [
        ["generate", f"/{LONG}"],
        ["train", f"--out=/{LONG}/run"],
        ["train", f"--data=/{LONG}"],
        ["train", f"--tokenizer=/{LONG}"],
        ["train", "--resume", f"--out=/{LONG}"],
        ["convert", f"/{LONG}", "/y", "--to=shared"],
        ["analyze", f"/{LONG}"],
        ["generate", "/", f"--config=/{LONG}.json"],
        ["compare", "--resume", f"--out=/{LONG}"],
        ["probe", "/dev/null"],
    ],
    ids=lambda command: " ".join(command)[:30],
)
def test_names_that_are_too_long_are_one_line(capsys, command):
    one_error(capsys, *command)


@pytest.mark.parametrize("name", ["out", "data", "tokenizer"])
def test_a_path_of_a_file_of_options_is_one(tmp_path, capsys, name):
    for path in ("a\0b", "a\ud800b"):
        (tmp_path / "options.json").write_text(json.dumps({name: path}))
        error = one_error(capsys, "train", f"--config={tmp_path / 'options.json'}")
        assert f"--{name} must be a path, got {path!r}" in error
