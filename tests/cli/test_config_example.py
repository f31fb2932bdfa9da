# SPDX-License-Identifier: Apache-2.0
"""The page's example of --config, run as written but for a text of its own."""

import json
import re
import shlex
from pathlib import Path

from commands import refusal

from unipool import cli

PAGE = Path(__file__).resolve().parents[2] / "docs" / "cli.md"


def test_the_example_of_options_in_a_file(tmp_path, monkeypatch, text):
    monkeypatch.chdir(tmp_path)
    section = PAGE.read_text().split("## Options from a file")[1].split("\n## ")[0]
    (options,) = re.findall(r"```toml\n(.*?)```", section, re.S)
    Path("narrow.toml").write_text(options)
    first, again = re.findall(r"^unipool (train .*)$", section, re.M)
    on_text = ["--data", str(text), "--device", "cpu", "--seq-len", "32", "--eval-tokens", "512"]

    assert cli.main([*shlex.split(first), *on_text]) == 0
    config = json.loads(Path("runs/narrow/config.json").read_text())
    assert (config["steps"], config["d_model"], config["top_k"]) == (10, 32, 2)
    assert config["lr"] == 2e-3

    assert cli.main([*shlex.split(again), "--device", "cpu"]) == 0
    repeated = json.loads(Path("runs/narrow-1/config.json").read_text())
    changed = {name for name in config if config[name] != repeated[name]}
    assert changed == {"seed", "out"}


def test_a_name_in_a_file_that_is_unknown_gets_the_nearest(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name, content in (
        ("wrong.toml", "stpes = 5\n"),
        ("wrong.yaml", "stpes: 5\n"),
        ("wrong.json", '{"stpes": 5}'),
    ):
        Path(name).write_text(content)
        line = refusal(capsys, "train", "--config", name)
        assert name in line
        assert "stpes" in line
        assert "steps" in line
