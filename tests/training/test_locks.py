# SPDX-License-Identifier: Apache-2.0
"""Two commands at one folder: the second neither trains over what the first made nor removes it."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from unipool.compare import members
from unipool.compare import run as compare_run
from unipool.compare.members import Member, failure, run_members
from unipool.compare.sweep import Sweep
from unipool.configs import CompareConfig, DemoConfig
from unipool.errors import InputError
from unipool.training import run
from unipool.training.demo import demo_configs, run_demo
from unipool.training.run import locked, run_training

pytest.importorskip("transformers")
pytestmark = [pytest.mark.usefixtures("small_scale"), pytest.mark.any_device]


def contents(folder):
    return {
        path.relative_to(folder): path.read_bytes()
        for path in Path(folder).rglob("*")
        if path.is_file()
    }


@pytest.fixture
def config(config):
    return replace(config, steps=2, eval_every=0)


def meanwhile(monkeypatch, module, name, happens):
    """Let something happen once, while a command reads its text."""
    usual = getattr(module, name)

    def slow(*arguments, **options):
        monkeypatch.setattr(module, name, usual)
        happens()
        return usual(*arguments, **options)

    monkeypatch.setattr(module, name, slow)


def test_a_fresh_run_does_not_train_over_one_that_ended_meanwhile(config, monkeypatch):
    meanwhile(monkeypatch, run, "open_data", lambda: run_training(config))
    with pytest.raises(InputError, match="already holds a run: add --resume"):
        run_training(replace(config, steps=3))
    assert sorted(p.name for p in Path(config.out, "checkpoints").iterdir()) == ["step-2"]
    assert '"steps": 2' in Path(config.out, "config.json").read_text()


def test_nor_into_a_folder_that_was_filled_meanwhile(config, monkeypatch):
    def fill():
        Path(config.out).mkdir()
        Path(config.out, "notes").write_text("mine")

    meanwhile(monkeypatch, run, "open_data", fill)
    with pytest.raises(InputError, match="is not empty and holds no run"):
        run_training(config)
    assert contents(config.out).keys() == {Path("notes"), Path(".lock")}


def test_a_sweep_does_not_replace_one_that_began_meanwhile(text, tmp_path, monkeypatch):
    out = tmp_path / "sweep"
    options = {"data": (str(text),), "seq_len": 32, "out": out, "pools": (1,), "device": "cpu"}

    def begin():
        out.mkdir()
        (out / "sweep.json").write_text("of another")

    meanwhile(monkeypatch, compare_run, "open_data", begin)
    with pytest.raises(InputError, match="already holds a sweep"):
        compare_run.run_compare(CompareConfig(**options))
    assert (out / "sweep.json").read_text() == "of another"


HOLD = """
import sys
from pathlib import Path
from unipool.training.run import locked
with locked(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def hold():
    """Another process that trains in a folder."""
    started = []

    def start(folder):
        command = [sys.executable, "-c", HOLD, str(folder)]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        started.append(subprocess.Popen(command, **pipes))
        assert started[-1].stdout.readline() == b"held\n"

    yield start
    for process in started:
        process.communicate()
        assert process.returncode == 0


@pytest.fixture
def demo(tmp_path):
    """A demo that ended, as far as its folders show."""
    config = DemoConfig(out=tmp_path / "demo", steps=1)
    for run_config in demo_configs(config).values():
        folder = Path(run_config.out)
        (folder / "checkpoints" / "step-1").mkdir(parents=True)
        (folder / "config.json").write_text(run_config.to_json())
        (folder / "checkpoints" / "step-1" / "weights").write_text("hours of work")
    return config


@pytest.mark.parametrize("at", ["", "layer-private", "half-pool"])
def test_a_demo_leaves_alone_what_another_process_trains(demo, hold, at):
    hold(demo.out / at)
    before = contents(demo.out)
    with pytest.raises(InputError, match="another process is training there"):
        run_demo(demo)
    after = contents(demo.out)
    assert {name: after[name] for name in before} == before


def test_a_demo_leaves_alone_what_is_none(demo):
    before = contents(demo.out)
    (demo.out / "half-pool" / "config.json").unlink()
    with pytest.raises(InputError, match="half-pool is there and is no run of the demo"):
        run_demo(demo)
    assert contents(demo.out).keys() - {Path("half-pool/.lock")} >= {
        name for name in before if name != Path("half-pool/config.json")
    }


def test_a_demo_does_not_follow_a_link_to_clear(demo, tmp_path):
    (demo.out / "half-pool").rename(tmp_path / "elsewhere")
    (demo.out / "half-pool").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(InputError, match="half-pool is there and is no run of the demo"):
        run_demo(demo)
    assert (tmp_path / "elsewhere" / "config.json").exists()


def test_a_demo_that_nobody_runs_is_cleared(demo, monkeypatch):
    from unipool.training import demo as module

    def stop(config, **_):
        assert contents(Path(config.out)).keys() == {Path(".lock")}
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "run_training", stop)
    with pytest.raises(KeyboardInterrupt):
        run_demo(demo)


def test_a_sweep_leaves_alone_a_member_that_another_process_trains(config, tmp_path, hold):
    variant = Sweep.of(CompareConfig(pools=(1,))).variants[0]
    busy = Member(variant, replace(config, out=str(tmp_path / "busy")))
    (busy.folder / "model").mkdir(parents=True)
    (busy.folder / "model" / "weights").write_text("being written")
    hold(busy.folder)
    assert run_members([busy], 1, Console(quiet=True)) is None
    assert failure(busy) == f"--out {busy.folder}: another process is training there"
    assert (busy.folder / "model" / "weights").exists()
    assert members.outcome(busy) is None


def test_a_lock_that_was_removed_does_not_count(tmp_path, monkeypatch):
    usual = run.fcntl.flock

    def flock(handle, how):
        (tmp_path / ".lock").unlink()
        usual(handle, how)

    monkeypatch.setattr(run.fcntl, "flock", flock)
    with pytest.raises(InputError, match="another process"), locked(tmp_path):
        pass
