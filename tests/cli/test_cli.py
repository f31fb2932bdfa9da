# SPDX-License-Identifier: Apache-2.0
"""The command line: options, one-line errors, signals."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from commands import refusal
from specs import PUBLIC_OPS

pytest.importorskip("typer")
pytest.importorskip("transformers")

from unipool import cli
from unipool.files import latest_checkpoint
from unipool.training.config import TrainConfig
from unipool.training.metrics import read_metrics

pytestmark = pytest.mark.usefixtures("small_scale")

SMALL = [
    *("--d-model", "32", "--d-ff", "32", "--layers", "2", "--heads", "2", "--pool-size", "4"),
    *("--seq-len", "32", "--batch-size", "4", "--eval-tokens", "256"),
]


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("".join(f"{i} green bottles hanging on the wall\n" for i in range(500)))
    return path


def test_version_and_help(capsys):
    assert cli.main(["--version"]) == 0
    assert re.fullmatch(r"unipool \d+\S*\n", capsys.readouterr().out)
    assert cli.main(["train", "--help"]) == 0
    text = capsys.readouterr().out
    for name in TrainConfig.__dataclass_fields__:
        assert "--" + name.replace("_", "-") in text
    assert cli.main([]) == 0
    text = capsys.readouterr().out
    assert all(name in text for name in ("train", "demo", "generate", "doctor", "--version"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["trian"], "No such command 'trian'"),
        (["train", "--form", "dance"], "--form.*dance"),
        (["train", "--layers", "many"], "--layers.*integer"),
        (["train", "--top-k", "0"], "--top-k"),
        (["train", "--lr", "-1"], "--lr must be a positive number, got -1.0"),
        (["train", "--colour", "red"], "--colour"),
        (["train", "--scale", "1b"], "--scale must be one of .*, small, got 1b"),
        (["train", "--num-pools", "9"], r"num_pools must be in \[1, num_hidden_layers=4\], got 9"),
        (["train", "--data", "/no/such/file"], "data: /no/such/file does not exist"),
        (["train", "--tokenizer", "/no/such"], "tokenizer: /no/such is not a folder"),
        (["train", "--resume", "--out", "/no/such/run"], "--resume: /no/such/run holds no run"),
        (["generate", "/no/such/run"], "model: /no/such/run is not a folder"),
        (["generate"], "Missing argument"),
        (["doctor", "--jsn"], "doctor: unknown argument '--jsn'"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    assert re.search(message, refusal(capsys, *arguments))
    assert not list(tmp_path.iterdir()), "nothing is written before the input is known to be good"


def test_bad_data_names_file_and_line(tmp_path, monkeypatch, capsys, text):
    monkeypatch.chdir(tmp_path)
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"text": "a"}\n{"body": "b"}\n')
    assert "rows.jsonl:2 has no field 'text'" in refusal(capsys, "train", "--data", str(rows))
    short = refusal(capsys, "train", "--data", str(text), "--seq-len", "100000")
    assert "text.txt is shorter than one sequence" in short


def test_unwritable_folder(tmp_path, capsys, text):
    blocker = tmp_path / "file"
    blocker.write_text("")
    out = str(blocker / "run")
    assert "--out" in refusal(capsys, "train", *SMALL, "--data", str(text), "--out", out)


def test_train_then_generate(tmp_path, capsys, text, device):
    out, on_device = tmp_path / "run", ["--device", device.type]
    arguments = ["train", *SMALL, *on_device, "--data", str(text), "--out", str(out)]
    arguments += ["--steps", "3"]
    arguments += ["--lr", "1e-3", "--form", "vanilla", "--top-k", "2", "--log-every", "1"]
    assert cli.main(arguments) == 0
    assert f"model: {out / 'model'}" in capsys.readouterr().out.replace("\n", "")
    config = TrainConfig.load(out / "config.json")
    assert (config.form, config.top_k, config.lr, config.min_lr) == ("vanilla", 2, 1e-3, 1e-4)
    assert config.data == (str(text),)
    model = json.loads((out / "model" / "config.json").read_text())
    assert (model["num_pools"], model["num_experts"], model["num_experts_per_tok"]) == (2, 4, 2)
    assert [r["step"] for r in read_metrics(out / "metrics.jsonl")] == [1, 2, 3, 3]

    assert "already holds a run" in refusal(capsys, *arguments)
    changed = ["train", "--resume", "--out", str(out), "--seq-len", "64"]
    assert "--seq-len must stay 32" in refusal(capsys, *changed)
    assert cli.main(["train", "--resume", "--out", str(out), "--steps", "4"]) == 0
    assert read_metrics(out / "metrics.jsonl")[-1]["step"] == 4
    capsys.readouterr()

    generate = ["generate", str(out), "--prompt", "12 green", "--max-new-tokens", "8", *on_device]
    assert cli.main(generate) == 0
    assert capsys.readouterr().out.startswith("12 green")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_leaves_a_checkpoint_and_says_how_to_go_on(tmp_path, text, number, device):
    out = tmp_path / "run"
    command = [sys.executable, "-m", "unipool.cli", "train", *SMALL, "--data", str(text)]
    command += ["--device", device.type]
    command += ["--steps", "100000", "--out", str(out), "--save-every", "0", "--eval-every", "0"]
    child = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ
    )
    while not read_metrics(out / "metrics.jsonl"):
        assert child.poll() is None, child.stderr.read()
        time.sleep(0.02)
    child.send_signal(number)
    output, error = child.communicate()
    assert child.returncode == 128 + number
    assert "Traceback" not in error
    saved = latest_checkpoint(out / "checkpoints")
    step = int(re.search(r"stopped after step (\d+)", output).group(1))
    assert saved.name == f"step-{step}"
    line = re.search(r"go on with: .*?(train --resume.*)", output.replace("\n", ""))
    resume = line.group(1).split()
    assert resume[:3] == ["train", "--resume", "--out"]
    assert cli.main([*resume, "--steps", str(step + 1)]) == 0
    assert (out / "model" / "model.safetensors").is_file()


def test_the_doctor_finds_that_every_op_works(capsys, device):
    cli.main(["doctor", "--json"])  # its code is also of what is installed
    found = json.loads(capsys.readouterr().out)["self_test"]
    here = {entry["op"]: entry["ok"] for entry in found if entry["device"] == device.type}
    assert here == dict.fromkeys(PUBLIC_OPS, True), found


def test_importing_unipool_loads_no_extra():
    code = "import sys, unipool; print(*sorted(m for m in sys.modules if '.' not in m))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = set(done.stdout.split())
    assert "torch" in loaded
    assert not loaded & {"transformers", "accelerate", "typer", "rich", "matplotlib"}
    assert done.stderr == ""


def test_without_typer_only_the_doctor_works(monkeypatch, capsys):
    monkeypatch.setattr(cli, "typer", None)
    assert 'needs typer: pip install "unipool[train]"' in refusal(capsys, "train")
    assert cli.main(["doctor"]) == 0


def test_module_entry_point():
    done = subprocess.run(
        [sys.executable, "-m", "unipool.cli", "generate", str(Path("/no/such"))],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert done.stderr == "unipool: model: /no/such is not a folder\n"
