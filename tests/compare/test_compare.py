# SPDX-License-Identifier: Apache-2.0
"""Sweeps: grids and presets, runs in processes of their own, and their numbers computed again."""

import json
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("typer")
pytest.importorskip("transformers")

from transformers import AutoModelForCausalLM

from unipool import cli
from unipool.compare import figures, members, report, summary
from unipool.compare.grid import Axes, Baseline, Size, Variant, grid, vanilla
from unipool.compare.members import Member, Outcome, run_members
from unipool.compare.presets import PRESETS, preset_variants, training, with_baselines
from unipool.compare.sweep import Sweep
from unipool.data.tokens import default_cache
from unipool.errors import InputError, TrainingError
from unipool.files import complete_folder
from unipool.models import parameter_counts, preset, preset_names
from unipool.report.tables import with_spread
from unipool.training.config import TrainConfig

pytestmark = pytest.mark.usefixtures("small_scale")

SCALES = preset_names()
TRAINING = ["--seq-len=32", "--batch-size=4", "--steps=6", "--eval-tokens=512", "--device=cpu"]
SEEDS = (0, 3)


def model_config(variant: Variant, baseline: Baseline):
    return TrainConfig(**variant.options(baseline)).model_config(256, 0)


# --- grids


@pytest.mark.parametrize("scale", SCALES)
def test_vanilla_and_main_are_the_models_of_the_scale(scale):
    baseline = Baseline.of(scale)
    (main,) = preset_variants(["main"], baseline)
    for variant, form in ((vanilla(baseline), "vanilla"), (main, "unipool")):
        got, due = model_config(variant, baseline), preset(scale, form, vocab_size=256)
        due.eos_token_id = 0
        assert got.to_dict() == due.to_dict()


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("scale", SCALES)
def test_every_preset_can_be_built_at_every_scale_with_equal_active_sizes(scale, name):
    baseline = Baseline.of(scale)
    variants = with_baselines(preset_variants([name], baseline), baseline)
    assert len({v.name for v in variants}) == len(variants) >= 2
    for variant in variants:
        counts = parameter_counts(model_config(variant, baseline))
        reference = parameter_counts(model_config(vanilla(baseline), baseline))
        one = reference["expert"] // baseline.experts  # of the baseline's
        assert counts["expert"] == variant.pools * variant.pool_size * one // variant.granularity
        config = model_config(variant, baseline)
        assert config.num_experts_per_tok * config.intermediate_size == baseline.d_ff
        # Only routers differ: with as many rows they are equal, but for the scales of NormRouter.
        if (variant.router, variant.pool_size) == ("norm", baseline.layer_experts):
            assert counts["active"] == reference["active"] + baseline.layers


def test_presets_at_the_smallest_published_scale():
    baseline = Baseline.of("182m")

    def sizes(name):
        return [(v.pools, v.pool_size, v.granularity) for v in preset_variants([name], baseline)]

    assert sizes("sharing") == [(g, 96 // g, 1) for g in (1, 2, 3, 4, 6, 12)]
    assert sizes("pool-size") == [(1, m, 1) for m in (40, 48, 64, 80, 96)]
    assert sizes("granularity") == [(1, 96, 1), (1, 192, 2), (1, 384, 4)]
    ablation = preset_variants(["ablation"], baseline)
    assert {(v.router, v.balance) for v in ablation if v.pools == 1} == {
        ("norm", "pool"),
        ("norm", "layer"),
        ("softmax", "pool"),
        ("softmax", "layer"),
    }
    assert [(v.router, v.pool_size) for v in ablation if v.pools == 12] == [("norm", 8)]
    both = preset_variants(["main", "delay"], baseline)
    assert [v.delay for v in both] == [1, 0]  # the model that both have comes once


def test_baselines_follow_the_granularity():
    baseline = Baseline.of("tiny")
    variants = with_baselines(preset_variants(["granularity"], baseline), baseline)
    names = ["softmax-4x4-k1-layer0", "softmax-4x8-k2-layer0", "softmax-4x16-k4-layer0"]
    assert [v.name for v in variants[:3]] == names
    assert [v.options(baseline)["d_ff"] for v in variants[:3]] == [128, 64, 32]
    assert [summary.label(v, baseline) for v in variants[:3]] == [
        "vanilla",
        "vanilla-k2",
        "vanilla-k4",
    ]


def test_help_names_every_preset_and_scale(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    assert cli.main(["compare", "--help"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    for name in (*PRESETS, *SCALES):
        assert re.search(rf"\b{name}\b", text), name


@pytest.mark.parametrize(
    ("value", "std", "form", "text"),
    [
        (0.0736, 0.0274, "+.3f", "+0.074 ± 0.027"),
        (-0.0001, 0.02, "+.3f", "+0.000 ± 0.020"),
        (-0.0001, None, ".3f", "0.000"),
        (-0.0006, None, "+.3f", "-0.001"),
    ],
)
def test_spreads_have_no_sign_and_zero_no_minus(value, std, form, text):
    assert with_spread(value, std, form) == text


def test_a_grid_has_every_combination_once():
    baseline = Baseline.of("tiny")
    sizes = (Size.parse("50%"), Size.parse("8"), Size.parse("100%"))
    axes = Axes(("norm", "recurrent-norm"), (1, 2), sizes, ("pool", "none"), (0, 1))
    variants = grid(baseline, axes)
    # 8 experts are 50 % of one pool and 100 % of two; delay means nothing without a balance loss.
    assert len(variants) == 2 * (2 + 2) * 3
    assert {v.pool_size for v in variants if v.pools == 2} == {4, 8}
    chosen = next(v for v in variants if v.router == "recurrent-norm")
    config = model_config(chosen, baseline)
    assert (config.router, config.router_scoring) == ("recurrent", "norm")


def test_the_balance_coefficient_is_that_of_the_loss():
    baseline = Baseline.of("830m")
    variants = grid(baseline, Axes(balance=("pool", "layer")))
    assert [v.options(baseline)["balance_coefficient"] for v in variants] == [2e-2, 1e-2]


# --- a real sweep


@pytest.fixture(scope="module")
def sweep(tmp_path_factory, text):
    """The folder of a sweep of three models with two seeds, and its standard output."""
    root = tmp_path_factory.mktemp("compare")
    command = [sys.executable, "-m", "unipool.cli", "compare", "--pools=1,2", "--jobs=2"]
    command += ["--seeds=0,3", f"--data={text}", f"--out={root / 'sweep'}", *TRAINING]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    run = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert run.returncode == 0, run.stderr + run.stdout
    return root / "sweep", run.stdout


def results_of(folder: Path) -> dict:
    return json.loads((folder / "results.json").read_text())


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
    deadline = time.monotonic() + 600
    while not (first / "metrics.jsonl").exists() or not (first / "metrics.jsonl").stat().st_size:
        assert child.poll() is None, child.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    child.send_signal(signal.SIGINT)
    output, error = child.communicate(timeout=600)
    assert (child.returncode, error) == (128 + signal.SIGINT, "")
    assert f"go on with: unipool compare --resume --out {folder}" in output.replace("\n", "")
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


# --- failures


def test_the_sweep_goes_on_past_a_failed_member_and_tries_it_again(sweep, tmp_path, capsys):
    source, _ = sweep
    folder = tmp_path / "sweep"
    begun = Sweep.load(source)
    options = begun.options | {"steps": 2}
    begun = replace(begun, seeds=(0,), variants=begun.variants[:2], options=options)
    folder.mkdir()
    (folder / "sweep.json").write_text(begun.to_json())
    blocked = folder / "runs" / begun.variants[0].name / "seed-0" / "checkpoints"
    blocked.parent.mkdir(parents=True)
    blocked.write_text("in the way")
    assert cli.main(["compare", "--resume", "--out", str(folder)]) == 1
    captured = capsys.readouterr()
    assert captured.err == "unipool: 1 of 2 runs failed; try them again with --resume\n"
    reason = f"--out {blocked.parent}: cannot write there: File exists"
    assert f"vanilla seed 0 failed: {reason}" in captured.out
    entries = results_of(folder)["variants"]
    assert [entry["runs"][0]["status"] for entry in entries] == ["failed", "complete"]
    assert entries[1]["difference"] == {"mean": None, "std": None, "n": 0}
    assert "vanilla seed 0 failed" in (folder / "report.html").read_text()
    blocked.unlink()
    assert cli.main(["compare", "--resume", "--out", str(folder)]) == 0
    assert "1 of 2 runs are complete" in capsys.readouterr().out
    assert results_of(folder)["variants"][1]["difference"]["n"] == 1


def fake_members(folder: Path, count: int) -> list[Member]:
    baseline = Baseline.of("tiny")
    return [
        Member(vanilla(baseline), TrainConfig(seed=seed, out=str(folder / f"seed-{seed}")))
        for seed in range(count)
    ]


def test_a_killed_process_fails_its_own_run_only(tmp_path, monkeypatch):
    code = "import os, sys; os.kill(os.getpid(), 9) if '1' in sys.argv[1][-1] else sys.exit('no')"
    monkeypatch.setattr(members, "COMMAND", (sys.executable, "-c", code))
    found = fake_members(tmp_path, 3)
    assert run_members(found, 2, report.Console(quiet=True)) is None
    reasons = [members.failure(member) for member in found]
    log = found[1].folder / "log.txt"
    assert reasons == ["no", f"killed by SIGKILL; see {log}", "no"]


@pytest.mark.parametrize("jobs", [1, 3])
def test_jobs_run_at_a_time_and_divide_the_cores(tmp_path, monkeypatch, jobs):
    """Each waits until as many have begun as may, however slow the machine is."""
    code = (
        "import os, sys, time, pathlib; folder = pathlib.Path(sys.argv[1]); "
        "(folder / 'begin').write_text(str(time.monotonic()))\n"
        f"while len(list(folder.parent.glob('*/begin'))) < {jobs}: time.sleep(0.05)\n"
        "(folder / 'threads').write_text(os.environ['OMP_NUM_THREADS']); "
        "(folder / 'end').write_text(str(time.monotonic()))"
    )
    monkeypatch.setattr(members, "COMMAND", (sys.executable, "-S", "-c", code))
    monkeypatch.delenv("OMP_NUM_THREADS")
    found = fake_members(tmp_path, 4)
    run_members(found, jobs, report.Console(quiet=True))
    spans = [
        tuple(float((m.folder / name).read_text()) for name in ("begin", "end")) for m in found
    ]
    most = max(sum(begin <= at < end for begin, end in spans) for at, _ in spans)
    assert most == jobs
    cores = len(os.sched_getaffinity(0))
    assert {(m.folder / "threads").read_text() for m in found} == {str(max(1, cores // jobs))}


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "seed-0").write_text("a file")
    with pytest.raises(TrainingError, match=r"cannot write .*seed-0: File exists"):
        run_members(fake_members(tmp_path, 1), 1, report.Console(quiet=True))


def test_an_outcome_counts_only_whole_runs(tmp_path):
    (member,) = fake_members(tmp_path, 1)
    member = replace(member, config=replace(member.config, steps=8))
    assert members.outcome(member) is None
    member.folder.mkdir()
    rows = [{"step": s, "lm_loss": 9.0 - s, "tokens_per_second": 10.0 * s} for s in (2, 4, 8)]
    rows += [{"step": 8, "val_loss": 1.5, "val_bits_per_byte": 2.0}]
    metrics = member.folder / "metrics.jsonl"
    metrics.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert members.outcome(member) is None, "the model is not there yet"
    model = member.folder / "model"
    with complete_folder(model) as staging:
        (staging / "weights").write_text("1")
    got = members.outcome(member)
    assert got == Outcome(1.5, 2.0, statistics.harmonic_mean([40, 80]), [[2, 7], [4, 5], [8, 1]])
    longer = replace(member, config=replace(member.config, steps=9))
    assert members.outcome(longer) is None
    (model / "weights").unlink()
    assert members.outcome(member) is None


def test_statistics_leave_out_what_is_missing(tmp_path, monkeypatch):
    """Differences are of equal seeds only; one value has no spread."""
    baseline = Baseline.of("tiny")
    variants = tuple(with_baselines(grid(baseline, Axes()), baseline))
    sweep = Sweep("tiny", variants, (0, 1, 2), training("tiny") | {"data": ()})
    losses = {
        ("softmax", 0): 2.0,
        ("softmax", 1): 4.0,
        ("norm", 1): 3.0,
        ("norm", 2): 1.0,
    }

    def outcome(member):
        loss = losses.get((member.variant.router, member.config.seed))
        return None if loss is None else Outcome(loss, loss, 1.0, [])

    monkeypatch.setattr(summary, "outcome", outcome)
    entries = summary.summarize(sweep, sweep.members(tmp_path))["variants"]
    assert entries[0]["val_loss"] == {"mean": 3.0, "std": pytest.approx(2**0.5), "n": 2}
    assert entries[1]["val_loss"] == {"mean": 2.0, "std": pytest.approx(2**0.5), "n": 2}
    assert entries[1]["difference"] == {"mean": -1.0, "std": None, "n": 1}
    assert [run["status"] for run in entries[1]["runs"]] == ["missing", "complete", "complete"]


def test_figures_show_axes_with_three_values_or_more(tmp_path, monkeypatch):
    baseline = Baseline.of("tiny")
    variants = with_baselines(preset_variants(["sharing", "pool-size"], baseline), baseline)
    sweep = Sweep("tiny", tuple(variants), (0, 1), training("tiny") | {"data": ()})

    def outcome(member):
        loss = member.variant.pool_size / 16 + member.config.seed
        return Outcome(loss, loss, 1.0, [[10, loss + 1], [20, loss]])

    monkeypatch.setattr(summary, "outcome", outcome)
    results = summary.summarize(sweep, sweep.members(tmp_path))
    drawn = figures.sweep_figures(results)
    assert list(drawn) == ["differences", "pools", "pool-size", "loss"]
    (line, *_) = drawn["pools"].axes[0].containers
    assert line[0].get_xdata().tolist() == [1, 2, 4]
    assert line[0].get_ydata() == pytest.approx([16 / 16 - 4 / 16, 8 / 16 - 4 / 16, 0.0])
    (line, *_) = drawn["pool-size"].axes[0].containers
    assert line[0].get_xdata().tolist() == [7, 8, 11, 13, 16]
    assert len(drawn["differences"].axes[0].get_yticks()) == len(variants) - 1
    assert len(drawn["loss"].axes[0].get_legend().get_texts()) == len(variants)


# --- bad input


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "give either --preset (main, sharing, pool-size, ablation, granularity, delay, "),
        (["--preset=main", "--pools=1"], "give either --preset"),
        (["--preset=all"], "--preset must be among main, sharing,"),
        (["--preset=main", "--scale=3b"], "--scale must be one of 182m, 469m,"),
        (["--pools=0"], "--pools must be in [1, 4], the layers of --scale tiny, got 0"),
        (["--pools=1,5"], "--pools must be in [1, 4], the layers of --scale tiny, got 5"),
        (["--pools=two"], "--pools must be numbers with commas between, got 'two'"),
        (["--router=norm,hash"], "--router must be among norm, softmax, recurrent, recurrent-norm"),
        (["--balance=some"], "--balance must be among pool, layer, none, got some"),
        (["--delay=2"], "--delay must be among 0, 1, got 2"),
        (["--granularity=3"], "--granularity must divide 128, the width of an expert of --scale"),
        (["--pool-size=0"], "--pool-size must be a number of experts such as 24, or a part of"),
        (["--pool-size=half"], "such as 50%, got 'half'"),
        (["--pool-size=2", "--granularity=4"], "norm-1x2-k4-pool1: UniPoolConfig: num_experts_per"),
        (["--pools=1", "--seeds=0,0"], "--seeds must be distinct numbers, got [0, 0]"),
        (["--pools=1", "--seeds=-1"], "--seed must be in [0, 2**32), got -1"),
        (["--pools=1", "--steps=0"], "--steps must be >= 1, got 0"),
        (["--pools=1", "--seq-len=100000"], "is shorter than one sequence"),
        (["--resume"], "holds no sweep"),
        (
            ["--resume", "--pools=1"],
            "--resume takes the sweep in --out as it is: leave out --pools",
        ),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(tmp_path, text, capsys, options, message):
    out = tmp_path / "out"
    given = options if "--resume" in options else [*options, f"--data={text}"]
    assert cli.main(["compare", *given, "--out", str(out)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert message in error
    assert not out.exists()


def test_a_folder_in_use_is_refused(tmp_path, capsys, sweep):
    folder, _ = sweep
    assert cli.main(["compare", "--pools=1", "--out", str(folder)]) == 2
    assert "already holds a sweep: add --resume to go on" in capsys.readouterr().err
    (tmp_path / "notes.txt").write_text("mine")
    assert cli.main(["compare", "--pools=1", "--out", str(tmp_path)]) == 2
    assert "is not empty and holds no sweep" in capsys.readouterr().err
    (tmp_path / "sweep.json").write_text('{"scale": "tiny"}')
    assert cli.main(["compare", "--resume", "--out", str(tmp_path)]) == 2
    assert "sweep.json is not a sweep" in capsys.readouterr().err


def test_sizes_are_numbers_or_parts():
    baseline = Baseline.of("182m")
    assert Size.parse("24").experts(baseline, 2, 4) == 24
    assert Size.parse("41.6%").experts(baseline, 1, 1) == 40
    assert Size.parse("50%").experts(baseline, 4, 2) == 24
    assert Size.parse("0.1%").experts(baseline, 12, 1) == 1
    for text in ("", "-3", "0%", "1e3", "nan%", "inf%"):
        with pytest.raises(InputError, match="--pool-size must be"):
            Size.parse(text)
