# SPDX-License-Identifier: Apache-2.0
"""Sweeps with failing members, and bad input."""

import json
import os
import statistics
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from commands import refusal
from sweeps import results_of

from unipool import cli
from unipool.compare import figures, members, report, summary
from unipool.compare.grid import Axes, Baseline, Size, grid, vanilla
from unipool.compare.members import Member, Outcome, run_members
from unipool.compare.presets import preset_variants, training, with_baselines
from unipool.compare.sweep import Sweep
from unipool.errors import InputError, TrainingError
from unipool.files import complete_folder
from unipool.training.config import TrainConfig

pytest.importorskip("typer")
pytest.importorskip("transformers")
pytestmark = pytest.mark.usefixtures("small_scale")


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
    with pytest.raises(TrainingError, match=r"cannot write .*seed-0: Not a directory"):
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

    monkeypatch.setattr(summary, "known_outcome", outcome)
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

    monkeypatch.setattr(summary, "known_outcome", outcome)
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
    assert message in refusal(capsys, "compare", *given, "--out", out)
    assert not out.exists()


def test_a_folder_in_use_is_refused(tmp_path, capsys, sweep):
    folder, _ = sweep
    held = refusal(capsys, "compare", "--pools=1", "--out", folder)
    assert "already holds a sweep: add --resume to go on" in held
    (tmp_path / "notes.txt").write_text("mine")
    other = refusal(capsys, "compare", "--pools=1", "--out", tmp_path)
    assert "is not empty and holds no sweep" in other
    (tmp_path / "sweep.json").write_text('{"scale": "tiny"}')
    resumed = refusal(capsys, "compare", "--resume", "--out", tmp_path)
    assert "sweep.json is damaged" in resumed


def test_sizes_are_numbers_or_parts():
    baseline = Baseline.of("182m")
    assert Size.parse("24").experts(baseline, 2, 4) == 24
    assert Size.parse("41.6%").experts(baseline, 1, 1) == 40
    assert Size.parse("50%").experts(baseline, 4, 2) == 24
    assert Size.parse("0.1%").experts(baseline, 12, 1) == 1
    for text in ("", "-3", "0%", "1e3", "nan%", "inf%"):
        with pytest.raises(InputError, match="--pool-size must be"):
            Size.parse(text)
