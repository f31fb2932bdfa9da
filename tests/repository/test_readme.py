# SPDX-License-Identifier: Apache-2.0
"""README and docs/: Python blocks run as written, commands name options that exist, figures and
picture are those of the committed results, and the state on GPUs is that of hardware.md."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text()
PAGES = {path.name: path.read_text() for path in (ROOT / "README.md", *ROOT.glob("docs/*.md"))}
BLOCKS = {
    f"{name}-{i}": block
    for name, text in PAGES.items()
    for i, block in enumerate(re.findall(r"^```python\n(.*?)^```", text, re.S | re.M))
}
OPTIONS = {  # command -> the options that some page names
    command: set()
    for text in PAGES.values()
    for command in re.findall(r"^unipool (\w+)", text, re.M)
}
for text in PAGES.values():
    for command, rest in re.findall(r"^unipool (\w+)(.*)$", text, re.M):
        OPTIONS[command].update(re.findall(r"--[a-z-]+", rest.split("#")[0]))


@pytest.mark.parametrize("block", BLOCKS.values(), ids=BLOCKS)
def test_python_block(block, tmp_path):
    run = subprocess.run(
        [sys.executable, "-c", block], capture_output=True, text=True, cwd=tmp_path
    )
    assert run.returncode == 0, run.stderr
    if loss := re.search(r"loss ([0-9.]+)", run.stdout):
        assert float(loss.group(1)) < 0.25  # it was about 1 before the training


def test_there_are_blocks_and_commands():
    assert {"README.md-0", "models.md-0"} <= set(BLOCKS)
    assert {"train", "compare", "eval", "convert", "resize"} <= set(OPTIONS)


def run_script(path: str, *arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, str(ROOT / path), *arguments]
    return subprocess.run(command, capture_output=True, text=True)


@pytest.mark.parametrize("command", OPTIONS)
def test_command_options_exist(command):
    text = subprocess.run(
        [sys.executable, "-m", "unipool.cli", command, "--help"],
        capture_output=True,
        text=True,
        check=True,
        env={"COLUMNS": "200", "PATH": "", "HOME": str(ROOT)},
    ).stdout
    for option in OPTIONS[command]:
        assert option in text, f"unipool {command} has no {option}"


def test_every_command_is_in_the_table_of_commands():
    listed = re.findall(r"^\| `unipool (\w+)` \|", PAGES["cli.md"], re.M)
    text = subprocess.run(
        [sys.executable, "-m", "unipool.cli", "--help"], capture_output=True, text=True, check=True
    ).stdout
    commands = re.findall(r"^  ([a-z]+) ", text[text.index("Commands:") :], re.M)
    assert sorted(listed) == sorted(commands)


@pytest.mark.parametrize("script", ["bench/update_docs.py", "docs/draw_overview.py"])
def test_figures_are_those_of_the_committed_results(script):
    run = run_script(script, "--check")
    assert run.returncode == 0, run.stderr


def test_readme_fits():
    assert len(README.splitlines()) <= 120


def test_state_on_gpus_is_that_of_the_hardware_page():
    rows = re.findall(r"^\| `.*\| (.*) \|$", PAGES["hardware.md"], re.M)
    assert rows
    nothing_ran = all("not yet run" in row for row in rows)
    assert ("**not yet run on a GPU**" in README) == nothing_ran


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_to_files(page):
    folder = ROOT if page == "README.md" else ROOT / "docs"
    links = re.findall(r"\]\(([^)#\s:]+)(?:#[^)]*)?\)", PAGES[page])
    missing = [link for link in links if not (folder / link).exists()]
    assert not missing


FOLDERS = ("bench", "csrc", "docs", "profiling", "softgpu", "tests", "unipool")


@pytest.mark.parametrize("page", ["CONTRIBUTING.md", *PAGES])
def test_files_that_are_named_exist(page):
    """Names in code marks that begin with a folder of the project, but for patterns and results."""
    text = PAGES.get(page) or (ROOT / page).read_text()
    named = re.findall(rf"`((?:{'|'.join(FOLDERS)})/[\w./-]+)`", text)
    missing = [name for name in named if "results" not in name and not (ROOT / name).exists()]
    assert not missing
