# SPDX-License-Identifier: Apache-2.0
"""Every file that a command reads back, damaged in every way: one line that names it, or a command
that does not mind. Never a traceback, and never the line of an error that nobody foresaw."""

import itertools
import json
import random
import shutil
from pathlib import Path

import pytest
from damaged import OF_ANY, of_json, reseal

pytest.importorskip("typer")
pytest.importorskip("transformers")

from unipool import cli
from unipool.compare import run as compare_run
from unipool.evaluation import run as evaluation_run
from unipool.files import MANIFEST, folder_fault
from unipool.training import demo as demo_module

pytestmark = pytest.mark.usefixtures("small_scale")

SIZES = ["--d-model=16", "--d-ff=8", "--layers=1", "--heads=2", "--kv-heads=1", "--pool-size=2"]
TRAINING = ["--seq-len=16", "--batch-size=2", "--eval-tokens=32", "--device=cpu"]
LOOK = ["--tokens=16", "--device=cpu"]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A text, a run of two steps, a tokenizer, and a sweep of which nothing is trained."""
    root = tmp_path_factory.mktemp("made")
    text = root / "text.txt"
    text.write_text("the cold river under a green stone\n" * 60)
    given = [f"--data={text}", *TRAINING]
    assert cli.main(["train", f"--out={root / 'run'}", "--steps=2", *SIZES, *given]) == 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compare_run, "run_members", lambda *_: 15)
        out = root / "sweep"
        command = ["compare", "--pools=1", "--seeds=0", "--steps=2", f"--out={out}", *given]
        assert cli.main(command) == 143
    (root / "load.json").write_text("[1, 2]")
    (root / "options.json").write_text('{"max-new-tokens": 1, "device": "cpu"}')
    (root / "rows").mkdir()
    (root / "rows" / "lambada_openai.jsonl").write_text('{"text": "one two three"}\n')
    return root


_SOME = 12
MODEL = ["config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"]
MODEL += ["model.safetensors"]
STATE = ["trainer_state.json", "log_window.json", "optimizer.pt", "scheduler.pt", "rng_state.pth"]
RUN = ["config.json", "data.key", "metrics.jsonl"]
CHECKPOINT = "run/checkpoints/step-2"


def command_of(name: str, root: Path) -> list[str]:
    run, out = root / "run", root / "out"
    return {
        "generate": ["generate", str(run), "--max-new-tokens=1", "--device=cpu"],
        "probe": ["probe", str(run), "--seeds=1", *LOOK],
        "analyze": ["analyze", str(run), f"--out={out}", "--shuffles=1", *LOOK],
        "eval": [
            *("eval", str(run), f"--data={root / 'rows'}", "--task=lambada_openai"),
            *("--device=cpu", "--limit=1"),
        ],
        "convert": ["convert", str(run), str(out), "--to=private", "--untie"],
        "resize": ["resize", str(root / CHECKPOINT), str(out), "--experts=3"],
        "load": ["resize", str(run), str(out), "--experts=3", f"--load={root / 'load.json'}"],
        "options": ["generate", str(run), f"--config={root / 'options.json'}"],
        "train": ["train", "--resume", f"--out={run}"],
        "compare": ["compare", "--resume", f"--out={root / 'sweep'}"],
        "tokenizer": [
            *("train", f"--tokenizer={run / 'model'}", f"--data={root / 'text.txt'}"),
            *(f"--out={out}", "--steps=1", *SIZES, *TRAINING),
        ],
    }[name]


# What each command reads: the files, and the sealed folder that they are in.
READ = {
    "generate": [*(f"run/model/{name}" for name in MODEL)],
    "probe": ["run/config.json", "run/data.key", "run/model/config.json"],
    "analyze": ["run/config.json", "run/data.key", "run/model/config.json"],
    "eval": ["run/config.json", "run/model/config.json", "rows/lambada_openai.jsonl"],
    "convert": [*(f"run/model/{name}" for name in MODEL)],
    "resize": [f"{CHECKPOINT}/config.json", f"{CHECKPOINT}/optimizer.pt"],
    "load": ["load.json"],
    "options": ["options.json"],
    "train": [*(f"run/{name}" for name in RUN), *(f"{CHECKPOINT}/{n}" for n in MODEL + STATE)],
    "compare": ["sweep/sweep.json"],
    "tokenizer": ["run/model/tokenizer.json", "run/model/tokenizer_config.json"],
}
SEALED = ["run/model", CHECKPOINT]
CASES = [(command, file) for command, files in READ.items() for file in files]
MANIFESTS = [
    *((command, f"run/model/{MANIFEST}") for command in ("generate", "eval", "convert")),
    ("resize", f"{CHECKPOINT}/{MANIFEST}"),
    ("train", f"{CHECKPOINT}/{MANIFEST}"),
]


@pytest.fixture
def copy(made, tmp_path, monkeypatch):
    """Puts back everything as it was made."""
    root = tmp_path / "root"

    def anew() -> Path:
        shutil.rmtree(root, ignore_errors=True)
        shutil.copytree(made, root)
        return root

    monkeypatch.setattr(compare_run, "run_members", lambda *_: 15)
    monkeypatch.setattr(compare_run, "show", lambda *_: None)
    monkeypatch.setattr(demo_module, "run_training", None)
    if not evaluation_run.importlib.util.find_spec("lm_eval"):
        pytest.importorskip("lm_eval")
    return anew


def damages(content: bytes):
    """Of JSON, some of the ways: all of them, for all commands, take an hour."""
    yield from ((name, damage(content)) for name, damage in OF_ANY.items())
    ways = list(of_json(content))
    yield from random.Random(len(ways)).sample(ways, min(_SOME, len(ways)))


def run(capsys, command: list[str], damaged: Path, what: str) -> int:
    capsys.readouterr()
    code = cli.main(command)
    error = capsys.readouterr().err
    label = f"{what}: {error}"
    assert code in (0, 1, 2, 143), label
    assert "an error of UniPool itself" not in error, label
    assert "Traceback" not in error, label
    if code in (1, 2):
        assert error.count("\n") == 1, label
        assert "\x1b" not in error, label
        names = (damaged.name, damaged.parent.name, str(damaged.parent.parent.name))
        assert any(name in error for name in names) or "--" in error, label
    return code


@pytest.mark.parametrize(("command", "file"), CASES, ids=lambda name: name.replace("/", "-"))
def test_a_damaged_file_is_one_line(copy, made, capsys, command, file):
    """Under a manifest that vouches for it, so that what comes after the sums is looked at."""
    content = (made / file).read_bytes()
    tried = 0
    for what, damaged in damages(content):
        root = copy()
        (root / file).write_bytes(damaged)
        for folder in SEALED:
            if file.startswith(folder + "/"):
                reseal(root / folder)
        run(capsys, command_of(command, root), root / file, what)
        tried += 1
    assert tried >= len(OF_ANY)


@pytest.mark.parametrize(("command", "file"), CASES, ids=lambda name: name.replace("/", "-"))
def test_a_file_that_is_gone_or_no_file_is_one_line(copy, capsys, command, file):
    for what, sealed in itertools.product(("gone", "folder", "loop"), (True, False)):
        root = copy()
        path = root / file
        path.unlink()
        if what == "folder":
            path.mkdir()
        elif what == "loop":
            path.symlink_to(path.name)
        for folder in SEALED:
            if sealed and what != "loop" and file.startswith(folder + "/"):
                reseal(root / folder)
        run(capsys, command_of(command, root), path, what)


FORGED = [
    ("lists nothing", {"format": 1, "files": {}}),
    ("newer", {"format": 2, "files": {"config.json": {"size": 1, "sha256": ""}}}),
    ("leads out", {"format": 1, "files": {"../x": {"size": 1, "sha256": ""}}}),
    ("absolute", {"format": 1, "files": {"/etc/passwd": {"size": 1, "sha256": ""}}}),
    ("no size", {"format": 1, "files": {"config.json": {"sha256": ""}}}),
    ("entries", {"format": 1, "files": {"config.json": 3}}),
    ("truth", {"format": True, "files": {"config.json": {"size": 1, "sha256": ""}}}),
]


@pytest.mark.parametrize(("command", "file"), MANIFESTS, ids=lambda name: name.replace("/", "-"))
def test_a_damaged_manifest_is_one_line(copy, made, capsys, command, file):
    forged = [(name, json.dumps(value).encode()) for name, value in FORGED]
    for what, damaged in (*damages((made / file).read_bytes()), *forged):
        root = copy()
        (root / file).write_bytes(damaged)
        assert folder_fault((root / file).parent) is not None, what
        code = run(capsys, command_of(command, root), root / file, what)
        assert (code == 0) == (command == "train"), what  # which begins anew, and says so


def test_a_file_that_no_manifest_lists_is_seen(copy, capsys):
    root = copy()
    (root / "run/model/more.json").write_text("{}")
    assert "more.json is not listed in manifest.json" in (folder_fault(root / "run/model") or "")
    assert cli.main(command_of("generate", root)) == 2
    assert "more.json is not listed" in capsys.readouterr().err
    (root / "run/model/more.json").rename(root / "run/model/.more.json")
    assert folder_fault(root / "run/model") is None


@pytest.mark.parametrize(
    "name", ["optimizer.pt", "scheduler.pt", "rng_state.pth", "log_window.json"]
)
def test_a_checkpoint_without_a_part_of_the_state_is_passed_over(copy, capsys, name):
    root = copy()
    (root / CHECKPOINT / name).unlink()
    reseal(root / CHECKPOINT)
    assert cli.main(command_of("train", root)) == 0
    assert f"step-2 is passed over: {name} is missing" in capsys.readouterr().out


def test_a_checkpoint_of_another_step_is_passed_over(copy, capsys):
    root = copy()
    (root / CHECKPOINT).rename(root / CHECKPOINT.replace("step-2", "step-1"))
    assert cli.main(command_of("train", root)) == 0
    assert "step-1 is passed over: trainer_state.json is of step 2" in capsys.readouterr().out


def test_metrics_are_not_thrown_away(copy, capsys):
    root = copy()
    path = root / "run/metrics.jsonl"
    first = path.read_text().splitlines()[0]
    path.write_text(f"{first}\nnoise\n{first}\n")
    assert cli.main(command_of("train", root)) == 2
    assert f"{path}, line 2, is damaged" in capsys.readouterr().err
    assert path.read_text().splitlines()[1] == "noise"
