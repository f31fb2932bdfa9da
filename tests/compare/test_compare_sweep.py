# SPDX-License-Identifier: Apache-2.0
"""A real sweep: its losses, figures and page, and going on after a stop."""

import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from sweeps import results_of
from transformers import AutoModelForCausalLM

from unipool import cli
from unipool.compare.sweep import Sweep
from unipool.data.tokens import default_cache

pytest.importorskip("typer")
pytest.importorskip("transformers")
pytestmark = pytest.mark.usefixtures("small_scale")


SEEDS = (0, 3)


def held_out_loss(run: Path) -> float:
    """Mean cross-entropy of the model of a run, in float64, over the text that it held out."""
    key = (run / "data.key").read_text().strip()[:32]
    tokens = np.fromfile(default_cache() / "tokens" / key / "val.bin", "<u2").astype(np.int64)
    model = AutoModelForCausalLM.from_pretrained(run / "model").double().eval()
    starts = range(0, len(tokens) - 1, 31)
    most = max(1, 512 // 31)
    if len(starts) > most:
        starts = [starts[i * len(starts) // most] for i in range(most)]
    nats, count = 0.0, 0
    for start in starts:
        ids = torch.from_numpy(tokens[start : start + 32])
        with torch.no_grad():
            log_p = model(input_ids=ids[None]).logits[0, :-1].log_softmax(-1)
        nats -= log_p.gather(1, ids[1:, None]).sum().item()
        count += len(ids) - 1
    return nats / count


def test_losses_are_those_of_the_saved_models(sweep):
    folder, _ = sweep
    entries = results_of(folder)["variants"]
    assert [entry["label"] for entry in entries] == [
        "vanilla",
        "norm-1x16-k1-pool1",
        "norm-2x8-k1-pool1",
    ]
    for entry in entries:
        for run, seed in zip(entry["runs"], SEEDS, strict=True):
            assert run["seed"] == seed
            due = held_out_loss(folder / run["folder"])
            assert run["val_loss"] == pytest.approx(due, rel=2e-5)
    losses = [run["val_loss"] for entry in entries for run in entry["runs"]]
    assert len(set(losses)) == 6


def test_means_spreads_and_differences(sweep):
    folder, output = sweep
    entries = results_of(folder)["variants"]
    loss = {e["label"]: np.array([r["val_loss"] for r in e["runs"]]) for e in entries}
    for entry in entries:
        own = loss[entry["label"]]
        for name, values in (("val_loss", own), ("difference", own - loss["vanilla"])):
            assert entry[name]["mean"] == pytest.approx(values.mean(), abs=1e-12)
            assert entry[name]["std"] == pytest.approx(values.std(ddof=1), abs=1e-12)
            assert entry[name]["n"] == 2
    shared = loss["norm-1x16-k1-pool1"] - loss["vanilla"]
    row = f"{shared.mean():+.4f} ± {shared.std(ddof=1):.4f} | 2/2"
    assert row in (folder / "table.md").read_text()
    assert f"{shared.mean():+.3f} ± {shared.std(ddof=1):.3f}" in output
    assert "3 models x 2 seeds, 2 at a time" in output
    assert output.count(": begun, see ") == 6


def test_seeds_mean_equal_text_for_all_models(sweep):
    folder, _ = sweep
    keys = {
        seed: {p.read_text() for p in folder.glob(f"runs/*/seed-{seed}/data.key")} for seed in SEEDS
    }
    assert [len(found) for found in keys.values()] == [1, 1]
    assert keys[0] != keys[3]


def test_parameters_are_those_of_the_saved_models(sweep):
    folder, _ = sweep
    for entry in results_of(folder)["variants"]:
        model = AutoModelForCausalLM.from_pretrained(folder / entry["runs"][0]["folder"] / "model")
        assert entry["params_total"] == sum(p.numel() for p in model.parameters())


def test_the_page_needs_nothing_beside_it_and_shows_every_model(sweep):
    folder, _ = sweep
    page = (folder / "report.html").read_text()
    assert "http" not in page.replace("http-equiv", "")
    assert page.count("data:image/png;base64,") == 2  # differences and loss: G has two values only
    assert (folder / "differences.png").stat().st_size > 5000
    for entry in results_of(folder)["variants"]:
        assert f"<td>{entry['label']}</td>" in page
    assert "6 steps of 4 sequences of 32 tokens" in page


def test_resume_trains_only_what_is_missing(sweep, tmp_path, capsys):
    source, _ = sweep
    folder = tmp_path / "sweep"
    shutil.copytree(source, folder)
    configs = list(folder.glob("runs/*/seed-*/config.json"))
    for path in configs:  # runs know their folder
        path.write_text(path.read_text().replace(str(source), str(folder)))
    lost = folder / "runs" / "norm-2x8-k1-pool1" / "seed-3"
    shutil.rmtree(lost)
    others = {p: p.stat().st_mtime_ns for p in folder.glob("runs/*/*/model/model.safetensors")}
    assert len(others) == 5
    assert cli.main(["compare", "--resume", "--out", str(folder)]) == 0
    assert "5 of 6 runs are complete" in capsys.readouterr().out
    assert {p: p.stat().st_mtime_ns for p in others} == others
    got, due = results_of(folder), results_of(source)
    for one, other in zip(got["variants"], due["variants"], strict=True):
        assert one["val_loss"] == other["val_loss"]
        assert one["difference"] == other["difference"]


def test_a_signal_stops_the_sweep_which_goes_on_to_equal_results(sweep, tmp_path):
    source, _ = sweep
    begun = Sweep.load(source)
    begun = replace(begun, seeds=(3,), variants=begun.variants[:2], options=begun.options)
    folder = tmp_path / "sweep"
    folder.mkdir()
    # Many steps in a first try, so that the signal finds the run at work.
    command = [sys.executable, "-m", "unipool.cli", "compare", "--resume", "--out", str(folder)]
    slow = replace(begun, options=begun.options | {"steps": 100_000, "log_every": 1})
    (folder / "sweep.json").write_text(slow.to_json())
    child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    first = folder / "runs" / begun.variants[0].name / "seed-3"
    while not (first / "metrics.jsonl").exists() or not (first / "metrics.jsonl").stat().st_size:
        assert child.poll() is None, child.stderr.read()
        time.sleep(0.05)
    child.send_signal(signal.SIGINT)
    output, error = child.communicate()
    assert (child.returncode, error) == (128 + signal.SIGINT, "")
    assert re.search(rf"go on with: .*compare --resume --out {folder}$", output.replace("\n", ""))
    assert list((first / "checkpoints").glob("step-*"))
    assert not (folder / "runs" / begun.variants[1].name).exists()
    statuses = [run["status"] for e in results_of(folder)["variants"] for run in e["runs"]]
    assert statuses == ["missing", "missing"]
    shutil.rmtree(folder / "runs")
    (folder / "sweep.json").write_text(begun.to_json())
    assert cli.main(command[3:]) == 0
    due = {e["name"]: e["runs"][1]["val_loss"] for e in results_of(source)["variants"]}
    for entry in results_of(folder)["variants"]:
        assert entry["runs"][0]["val_loss"] == due[entry["name"]]
