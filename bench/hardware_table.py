# SPDX-License-Identifier: Apache-2.0
"""Writes the GPU column of docs/hardware.md from the results of bench/gpu_check.sh.

    python bench/hardware_table.py [RUN ...] [--to FILE]

RUN is a folder with summary.json and smoke.json; without one, all in bench/results. An op's cell
names GPU, driver and commit, and what smoke, tests and sanitizers said. A rehearsal is refused: it
says nothing about a GPU.
"""

import argparse
import json
import re
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "hardware.md"
COLUMN = "GPU, driver, commit"
NOT_YET = "not yet run"
SANITIZERS = ("memcheck", "racecheck", "initcheck", "synccheck")


@dataclass(frozen=True)
class Run:
    name: str
    summary: dict
    smoke: dict  # results and raised of smoke.json; empty if it did not come so far

    def status(self, step: str) -> str:
        found = [s["status"] for s in self.summary["steps"] if s["name"] == step]
        return found[0] if found else "not run"

    @property
    def place(self) -> str:
        s = self.summary
        commit = s["commit"]
        short = commit[:9] + ("-dirty" if commit.endswith("-dirty") else "")
        return f"{s['gpu']}, {s['driver']}, {short}"


class RefusedError(ValueError):
    """These results may not be written into the page."""


def load(folder: Path) -> Run:
    summary = json.loads((folder / "summary.json").read_text())
    smoke = folder / "smoke.json"
    run = Run(folder.name, summary, json.loads(smoke.read_text()) if smoke.exists() else {})
    parts = [summary, run.smoke.get("environment", summary)]
    if any(part.get("rehearsal", True) for part in parts):
        raise RefusedError(f"{folder}: a rehearsal says nothing about a GPU")
    return run


def belongs(result: str, op: str) -> bool:
    """Whether a result of smoke.json, `permute` or `unpermute_weighted`, is one of an op."""
    return result == op or result.startswith(f"{op}_")


def findings(run: Run, ops: list[str]) -> str:
    """What a run says of these ops; empty if it says nothing."""
    mine = [r for r in run.smoke.get("results", []) if any(belongs(r["op"], op) for op in ops)]
    raised = [
        line
        for line in run.smoke.get("raised", [])
        if any(belongs(line.split()[0], o) for o in ops)
    ]
    if not mine and not raised:
        return ""
    compared = sum(r["compared"] for r in mine)
    wrong = sum(len(r["failed"]) for r in mine)
    said = [f"{compared} results as on the CPU"]
    if wrong:
        said = [f"**{wrong} of {compared} results differ from the CPU's**"]
    if raised:
        said.append(f"**{len(raised)} calls failed**")
    clean = [tool for tool in SANITIZERS if run.status(tool) == "passed"]
    dirty = [tool for tool in SANITIZERS if run.status(tool) == "failed"]
    if clean:
        said.append(f"{', '.join(clean)} clean")
    if dirty:
        said.append(f"**{', '.join(dirty)} failed**")
    if run.status("tests") in ("passed", "failed"):
        said.append("all tests pass" if run.status("tests") == "passed" else "**tests fail**")
    return f"{run.place}: {'; '.join(said)}"


def cell(runs: list[Run], ops: list[str]) -> str:
    """Of the last run on each GPU, by the names of their folders."""
    last = {run.summary["gpu"]: run for run in sorted(runs, key=lambda run: run.name)}
    said = [text for run in last.values() if (text := findings(run, ops))]
    return "<br>".join(said) or NOT_YET


def updated(page: str, runs: list[Run]) -> str:
    """The page with the last column of its table of kernels filled from `runs`."""
    lines, inside, found = [], False, False
    for line in page.splitlines():
        before, _, last = line.rstrip().removesuffix("|").rpartition("|")
        if line.startswith("|") and last.strip() == COLUMN:
            inside = found = True
        elif not line.startswith("|"):
            inside = False
        elif inside and not set(last) <= set("-: "):
            ops = re.findall(r"`(\w+)`", line.split("|")[1])
            line = f"{before}| {cell(runs, ops)} |"
        lines.append(line)
    if not found:
        raise RefusedError(f"the page has no table with the column '{COLUMN}'")
    return "\n".join(lines) + "\n"


def committed_runs(results: Path = ROOT / "bench" / "results") -> list[Run]:
    return [load(path.parent) for path in sorted(results.glob("*/summary.json"))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, nargs="*", help="folders of gpu_check")
    parser.add_argument("--to", type=Path, default=PAGE, help="where the page goes")
    arguments = parser.parse_args()
    try:
        runs = [load(folder) for folder in arguments.run] or committed_runs()
        page = updated(PAGE.read_text(), runs)
    except RefusedError as error:
        sys.exit(f"hardware_table: {error}")
    arguments.to.write_text(page)
    print(f"hardware_table: wrote {arguments.to}")


if __name__ == "__main__":
    main()
