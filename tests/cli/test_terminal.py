# SPDX-License-Identifier: Apache-2.0
"""Names, paths and texts of others on a terminal and in pages: shown, never acted on."""

import ast
import importlib
import io
import re
import sys
from pathlib import Path

import pytest

pytest.importorskip("typer")
pytest.importorskip("transformers")

from rich.console import Console

import unipool
from unipool import cli
from unipool.compare import report, summary
from unipool.compare.grid import Axes, Baseline, grid
from unipool.compare.members import Outcome
from unipool.compare.presets import training, with_baselines
from unipool.compare.sweep import Sweep
from unipool.models import generation
from unipool.report.page import document, image, paragraphs, table
from unipool.report.tables import add_row, markdown, terminal
from unipool.terminal import printable, say

pytestmark = pytest.mark.usefixtures("small_scale")
EVIL = "[/red][bold]:smile:\x1b]0;title\x07\x1b[2J\x9b2K\r\u202e<script>|`\udcff\ud800\x00"


def harmful(text):
    """Characters that a terminal acts on or that cannot be written."""
    return re.findall("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]", text)


def test_harmful_characters_are_shown_as_escapes():
    assert harmful(EVIL)
    assert printable(EVIL).startswith("[/red][bold]:smile:\\x1b]0;title\\x07\\x1b[2J\\x9b2K\\r")
    assert printable("\udcff\ud800\u2028\U000e0041") == "\\xff\\ud800\\u2028\\U000e0041"
    assert printable("a\nb\tc") == "a\\nb\\tc"
    assert printable("a\nb\tc\r", lines=True) == "a\nb\tc\\r"
    assert printable(7) == "7"


@pytest.mark.parametrize("text", ["plain", "Größe 10 µm – ≤ 3", "日本語", "नमस्ते", "👩\u200d🔬", ""])
def test_words_of_any_language_stay(text):
    assert printable(text) == text


def test_every_character_is_safe():
    text = "".join(map(chr, range(0x11000)))
    assert not harmful(printable(text))
    printable(text).encode("utf-8")


@pytest.mark.parametrize("console", [None, Console(width=20, force_terminal=True)])
def test_say_prints_what_it_is_given(capsys, console):
    say(EVIL, console, title="[x]")
    printed = re.sub(r"\x1b\[[0-9;]*m", "", capsys.readouterr().out)  # its own bold
    assert printed == "[x]" + printable(EVIL) + "\n"


def test_tables_hold_text_and_no_markup():
    shown = terminal(["a", "b"], left=["a"])
    add_row(shown, "[/x]", EVIL)
    stream = io.StringIO()
    Console(file=stream, width=400).print(shown)
    assert "[/x]" in stream.getvalue()
    assert not harmful(stream.getvalue())
    assert (
        markdown(["a", "b"], [["x|y\nz", "1"]]) == "| a | b |\n| --- | --- |\n| x\\|y\\nz | 1 |\n"
    )


def test_pages_hold_text_and_no_tags():
    page = document(EVIL, table([EVIL], [[EVIL]]) + paragraphs([EVIL]) + image(EVIL, b""))
    assert "<script>" not in page
    assert not harmful(page)
    page.encode("utf-8")


def one_error(capsys, *command):
    assert cli.main(list(command)) in (1, 2)
    error = capsys.readouterr().err
    assert error.count("\n") == 1, error
    assert not harmful(error)
    return error


@pytest.mark.parametrize(
    "command",
    [
        ["generate", f"/x{EVIL[:-1]}"],
        ["generate", f"/x\n{EVIL[:-1]}"],
        ["train", f"--data=/x{EVIL[:-1]}"],
        ["train", f"--form={EVIL}"],
        ["train", f"--{EVIL}"],
        ["compare", f"--router={EVIL}"],
        [f"{EVIL}"],
        ["convert", f"/x{EVIL[:-1]}", "/y", "--to=shared"],
        ["doctor", f"--{EVIL}"],
    ],
)
def test_errors_are_one_line_of_plain_text(capsys, command):
    one_error(capsys, *command)


def test_a_run_in_a_folder_named_like_markup_ends_well(tmp_path, capsys):
    folder = tmp_path / "[/bold] \x1b[2J[link=x]"
    folder.mkdir(parents=True)
    (folder / "text.txt").write_text("the cold river under a green stone\n" * 300)
    options = ["--d-model=32", "--d-ff=32", "--layers=2", "--heads=2", "--pool-size=4"]
    options += ["--seq-len=32", "--batch-size=2", "--steps=2", "--eval-tokens=64", "--device=cpu"]
    out = folder / "run"
    assert cli.main(["train", f"--data={folder / 'text.txt'}", f"--out={out}", *options]) == 0
    assert cli.main(["train", "--resume", f"--out={out}", "--steps=3"]) == 0
    assert cli.main(["generate", str(out), "--prompt=a[/b]", "--max-new-tokens=4"]) == 0
    assert cli.main(["analyze", str(out), f"--out={folder / 'report'}", "--tokens=64"]) == 0
    assert cli.main(["probe", str(out), "--tokens=64", "--seeds=1"]) == 0
    captured = capsys.readouterr()
    assert not harmful(captured.out + captured.err)
    assert f"model: {printable(out / 'model')}" in captured.out.splitlines()
    assert "a[/b]" in captured.out
    assert not harmful((folder / "report" / "report.html").read_text())


def test_what_a_model_writes_cannot_move_the_cursor(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(generation, "generate", lambda *_: f"two\nlines{EVIL}")
    module = importlib.import_module("unipool.cli.generate")  # the package has a function so named
    monkeypatch.setattr(module, "find_model", lambda *_: None)
    assert cli.main(["generate", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert printed == printable(f"two\nlines{EVIL}", lines=True) + "\n"


def test_a_sweep_of_texts_named_like_markup_is_reported(tmp_path, capsys, monkeypatch):
    text = EVIL.translate({0: None, 0xD800: None})  # which no path holds
    baseline = Baseline.of("tiny")
    variants = with_baselines(grid(baseline, Axes()), baseline)
    sweep = Sweep("tiny", tuple(variants), (0,), training("tiny") | {"data": (text,)})
    monkeypatch.setattr(summary, "known_outcome", lambda _: Outcome(1.0, 1.0, 1.0, [[1, 1.0]]))
    monkeypatch.setattr(summary, "failure", lambda _: EVIL)
    results = summary.summarize(sweep, sweep.members(tmp_path))
    results["variants"][0]["runs"][0] |= {"status": "failed", "reason": EVIL}
    page = report.write_results(tmp_path, results)
    report.show(Console(), results, page)
    assert f"tokens) of {printable(text)}, learning" in capsys.readouterr().out
    for name in ("report.html", "table.md"):
        assert not harmful((tmp_path / name).read_text())
    assert "<script>" not in (tmp_path / "report.html").read_text()


def test_a_terminal_without_our_letters_ends_no_command(monkeypatch):
    ascii_only = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stderr", ascii_only)
    assert cli.main(["generate", "/größe"]) == 2
    ascii_only.flush()
    assert b"/gr\\xf6\\xdfe" in ascii_only.buffer.getvalue()


# --- one function for all of it

TABLES_AND_CONSTANTS = {"table", "shown", 'f"unipool {unipool.__version__}"'}


def printed(source: str) -> set[str]:
    """What is printed other than through `say` or `printable`."""
    calls = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)]
    named = [c for c in calls if getattr(c.func, "attr", getattr(c.func, "id", "")) == "print"]
    texts = {ast.unparse(c.args[0]).replace("'", '"') for c in named if c.args}
    return {text for text in texts if "printable(" not in text} - TABLES_AND_CONSTANTS


def test_everything_is_printed_by_one_function():
    root = Path(unipool.__file__).parent
    found = {path: printed(path.read_text()) for path in root.rglob("*.py")}
    assert found.pop(root / "terminal.py") == set()
    doctor = found.pop(root / "doctor.py")
    assert doctor == {'f"unipool: {what} (see --help)"'}
    assert not {path: texts for path, texts in found.items() if texts}


def test_the_look_for_other_prints_finds_them():
    source = 'print(x)\nconsole.print(f"{y}", soft_wrap=True)\nsay(z)\nprint(printable(z))\n'
    assert printed(source) == {"x", 'f"{y}"'}
