# SPDX-License-Identifier: Apache-2.0
"""python bench/mutation/run.py: plants small faults in copies of the package, and says which of
them the tests notice. docs/mutation.md tells how to read what it writes.

Nothing is written to the checkout but the results: faults are planted in a copy, made of the
tracked files and the built library.
"""

import argparse
import difflib
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
from operators import Mutant, mutants

ROOT = Path(__file__).resolve().parents[2]
CAUGHT, SURVIVED, TIMEOUT, UNREACHED = "caught", "survived", "timeout", "unreached"


def sample(root: Path, rooms: list[str], count: int, seed: int) -> list[Mutant]:
    """`count` mutants of the Python files of `rooms`, paths under root; drawn room by room with
    `seed` alone, so that the same sources give the same list on every machine."""
    chosen = []
    share = -(-count // len(rooms))
    for room in rooms:
        place = root / room
        files = sorted(place.rglob("*.py")) if place.is_dir() else [place]
        every = []
        for path in files:
            name = path.relative_to(root).as_posix()
            every += mutants(name, path.read_text(encoding="utf-8"))
        chance = random.Random(f"{seed} {room}")
        chosen += chance.sample(every, min(share, len(every)))
    return chosen[:count]


def copy_tree(root: Path, target: Path) -> None:
    """The tracked files as they are now, and the built libraries."""
    listed = subprocess.run(
        ["git", "ls-files", "-z"], cwd=root, capture_output=True, check=True
    ).stdout.decode()
    built = [p.relative_to(root).as_posix() for p in (root / "unipool").rglob("*.so")]
    for name in [*filter(None, listed.split("\0")), *built]:
        if (root / name).is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(root / name, target / name)


def environment(tree: Path) -> dict[str, str]:
    path = os.pathsep.join(filter(None, (str(tree), os.environ.get("PYTHONPATH"))))
    settings = {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    return os.environ | settings


def pytest(tree: Path, files: list[str], limit: float, *before: str) -> int | None:
    """The exit status of pytest, None if it ran past `limit` seconds."""
    command = [sys.executable, *before, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider"]
    process = subprocess.Popen(
        [*command, *files],
        cwd=tree,
        env=environment(tree),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        return process.wait(limit)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, 9)
        process.wait()
        return None


def survey(tree: Path, tests: list[str], package: str, store: Path) -> dict[str, dict]:
    """Per test file: its seconds, and the lines of `package` that it executes; kept in `store`.

    A file that fails without a fault can judge none, and is an error.
    """
    from coverage import CoverageData

    known = json.loads(store.read_text()) if store.exists() else {}
    for name in tests:
        if name in known:
            continue
        data = store.with_suffix(".coverage")
        data.unlink(missing_ok=True)
        begin = time.perf_counter()
        options = ("-m", "coverage", "run", f"--data-file={data}", f"--source={package}")
        status = pytest(tree, [name], 1800, *options)
        if status not in (0, 5):  # 5: all of the file is for another device
            raise SystemExit(f"{name} fails without a fault (exit status {status})")
        found = CoverageData(str(data))
        found.read()
        lines = {
            Path(file).relative_to(tree).as_posix(): sorted(found.lines(file))
            for file in found.measured_files()
        }
        known[name] = {"seconds": round(time.perf_counter() - begin, 2), "lines": lines}
        store.write_text(json.dumps(known))
    return {name: known[name] for name in tests}


def judges(mutant: Mutant, known: dict[str, dict]) -> list[str]:
    """The test files that execute the mutant's statement up to it, the quickest first."""
    lines = set(range(mutant.statement, mutant.line + 1))
    hit = [n for n, k in known.items() if lines & set(k["lines"].get(mutant.path, ()))]
    return sorted(hit, key=lambda name: (known[name]["seconds"], name))


def judge(mutant: Mutant, tree: Path, known: dict[str, dict]) -> dict:
    """A row of the results: file by file until one fails, each within ten times its usual time."""
    path = tree / mutant.path
    source = path.read_bytes()
    broken = mutant.applied(source)
    row = {"id": mutant.id, "path": mutant.path, "line": mutant.line, "rule": mutant.rule}
    row["diff"] = _diff(source, broken)
    begin, verdict, by = time.perf_counter(), UNREACHED, None
    path.write_bytes(broken)
    try:
        for by in judges(mutant, known):
            status = pytest(tree, [by], 10 * known[by]["seconds"] + 30)
            verdict = {0: SURVIVED, 5: SURVIVED, None: TIMEOUT}.get(status, CAUGHT)
            if verdict != SURVIVED:
                break
    finally:
        path.write_bytes(source)
    row["verdict"], row["by"] = verdict, by if verdict in (CAUGHT, TIMEOUT) else None
    return row | {"seconds": round(time.perf_counter() - begin, 1)}


def _diff(old: bytes, new: bytes) -> list[str]:
    lines = difflib.unified_diff(old.decode().splitlines(), new.decode().splitlines(), n=0)
    return [line for line in lines if line[:3] not in ("---", "+++") and line[:2] != "@@"]


def summary(rows: list[dict]) -> dict[str, dict[str, int]]:
    """Room -> verdict -> how many."""
    table: dict[str, dict[str, int]] = {}
    for row in rows:
        room = "/".join(row["path"].split("/")[:2])
        counts = table.setdefault(room, dict.fromkeys((CAUGHT, SURVIVED, TIMEOUT, UNREACHED), 0))
        counts[row["verdict"]] += 1
    return dict(sorted(table.items()))


def read_rows(path: Path) -> list[dict]:
    """The rows of an earlier run; a last line that was cut off counts as not run."""
    if not path.exists():
        return []
    text = path.read_text(encoding="utf-8")
    lines = text.splitlines()
    if text and not text.endswith("\n"):
        lines.pop()
        path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return [json.loads(line) for line in lines]


def campaign(chosen: list[Mutant], tree: Path, known: dict, out: Path, seconds: float) -> None:
    """Judge what `out` does not have yet, a line each, and stop to begin more after `seconds`."""
    done = {row["id"] for row in read_rows(out)}
    begin = time.perf_counter()
    with open(out, "a", encoding="utf-8") as file:
        for mutant in chosen:
            if mutant.id in done:
                continue
            if time.perf_counter() - begin >= seconds:
                return
            row = judge(mutant, tree, known)
            print(f"{row['verdict']:10}{mutant.path}:{mutant.line} {mutant.rule}", flush=True)
            file.write(json.dumps(row) + "\n")
            file.flush()


def options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rooms", default="unipool/ops,unipool/nn,unipool/models,unipool/training")
    parser.add_argument("--tests", default="tests", help="folders or files of tests, by commas")
    parser.add_argument("--count", type=int, default=400, help="mutants to draw")
    parser.add_argument("--seed", type=int, default=0, help="of the draw")
    parser.add_argument("--slice", default="1/1", metavar="I/N", help="every N-th, from the I-th")
    parser.add_argument("--seconds", type=float, default=3600, help="begin no mutant after these")
    parser.add_argument("--out", type=Path, default=ROOT / "bench/results/mutation/python.jsonl")
    survey_file = ROOT / "build/mutation-survey.json"
    parser.add_argument("--survey", type=Path, default=survey_file, help="what tests execute")
    parser.add_argument("--list", action="store_true", help="only list the mutants")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    chosen_options = options(arguments)
    part, parts = map(int, chosen_options.slice.split("/"))
    if not 1 <= part <= parts:
        raise SystemExit(f"--slice must be I/N with 1 <= I <= N, got {chosen_options.slice}")
    rooms = chosen_options.rooms.split(",")
    chosen = sample(ROOT, rooms, chosen_options.count, chosen_options.seed)[part - 1 :: parts]
    if chosen_options.list:
        for m in chosen:
            print(f"{m.id} {m.path}:{m.line} {m.rule}: {m.old!r} -> {m.new!r}")
        return
    tests = []
    for name in chosen_options.tests.split(","):
        place = ROOT / name
        found = sorted(place.rglob("test_*.py")) if place.is_dir() else [place]
        tests += [p.relative_to(ROOT).as_posix() for p in found]
    for path in (chosen_options.out, chosen_options.survey):
        path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="mutation-") as folder:
        tree = Path(folder)
        copy_tree(ROOT, tree)
        known = survey(tree, tests, "unipool", chosen_options.survey)
        campaign(chosen, tree, known, chosen_options.out, chosen_options.seconds)
    print(json.dumps(summary(read_rows(chosen_options.out)), indent=1))


if __name__ == "__main__":
    main()
