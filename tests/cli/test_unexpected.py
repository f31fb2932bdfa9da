# SPDX-License-Identifier: Apache-2.0
"""An error that nobody foresaw: one line, exit status 1, the traceback in a file."""

import re
import tempfile
from pathlib import Path

import pytest

from unipool import cli
from unipool.models import presets
from unipool.training import run


def test_one_line_names_the_file_with_the_traceback(tmp_path, monkeypatch, capsys, text):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))

    def breaks(*_, **__):
        raise KeyError("a name\nof two lines")

    monkeypatch.setattr(run, "AutoModelForCausalLM", breaks, raising=False)
    monkeypatch.setattr(run, "run_training", breaks)
    monkeypatch.setattr(presets, "preset", breaks)
    command = ["train", "--scale", "tiny", "--data", str(text), "--out", str(tmp_path / "run")]
    assert cli.main(command) == 1
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("unipool: an error of UniPool itself: KeyError: ")
    path = Path(re.search(r"traceback: (\S+);", line)[1])
    assert path.parent == tmp_path
    assert "in breaks" in path.read_text()
    assert path.stat().st_mode & 0o077 == 0


def test_where_no_file_can_be_written_the_traceback_is_shown(monkeypatch, capsys):
    def full(*_, **__):
        raise OSError("disk full")

    monkeypatch.setattr(tempfile, "mkstemp", full)
    monkeypatch.setattr(cli, "app", lambda **_: 1 / 0)
    assert cli.main(["train"]) == 1
    shown = capsys.readouterr().err
    assert "ZeroDivisionError" in shown.splitlines()[-1]
    assert "Traceback" in shown
    assert shown.splitlines()[-1].endswith("(traceback: above; please report it)")


@pytest.mark.parametrize("error", [KeyboardInterrupt(), SystemExit(3)])
def test_signals_and_exits_are_no_errors(monkeypatch, capsys, error):
    def stops(**_):
        raise error

    monkeypatch.setattr(cli, "app", stops)
    if isinstance(error, SystemExit):
        with pytest.raises(SystemExit):
            cli.main(["train"])
    else:
        assert cli.main(["train"]) == 130
    assert "error of UniPool" not in capsys.readouterr().err
