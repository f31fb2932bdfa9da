# SPDX-License-Identifier: Apache-2.0
"""Random valid and hostile calls of every op of the library.

    python bench/fuzz.py --calls 20000 [--seconds S] [--seed N] [--op NAME ...]
    python bench/fuzz.py --repeat NAME:SEED

Calls are made in a process of their own, which names each before it makes it: one that kills the
process or never returns is a finding like a wrong result, and the next process goes on after it.
A finding is printed with the command that repeats just that call. Exit status 1: a finding, or an
op that nothing here calls. --also FILE.py runs a file first, whose `targets` (fuzz_calls.Target by
name) are called as well. --json writes the counts.
"""

import argparse
import importlib.util
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import torch

if __name__ == "__main__":  # as a script the package beside is found where it is not installed
    root = Path(__file__).resolve().parents[1]
    sys.path[:0] = [str(root), str(root / "tests" / "support")]

import fuzz_calls
from fuzz_calls import FindingError, Target, run_call
from harness import processor

HANG = 120  # seconds after which a call counts as one that never returns
MEMORY = 16 * 2**30  # bytes of address space of a process; the absurd sizes are refused by it
SHOWN_LINES = 30  # of what a process said before it died


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--calls", type=int, default=20000)
    parser.add_argument("--seconds", type=float, default=float("inf"), help="stop after these")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--op", action="append", help="only this one; unipool::NAME is the raw op")
    parser.add_argument("--repeat", metavar="NAME:SEED", help="one call, in this process")
    parser.add_argument("--also", metavar="FILE.py", help="defines more targets")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--first", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--journal", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


def load_targets(also: str | None) -> dict[str, Target]:
    targets = {**fuzz_calls.raw_targets(), **fuzz_calls.public_targets()}
    if also:
        spec = importlib.util.spec_from_file_location("also", also)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        targets |= module.targets
    return targets


def call_at(names: list[str], seed: int, index: int) -> tuple[str, int]:
    """Ops take turns."""
    return names[index % len(names)], seed + index // len(names)


def make_calls(o: argparse.Namespace, targets: dict[str, Target], names: list[str]) -> None:
    """Writes a line per call to the journal: its name first, and what came of it behind that."""
    limit_memory()
    with o.journal.open("a", buffering=1) as journal:
        for index in range(o.first, o.calls):
            name, seed = call_at(names, o.seed, index)
            journal.write(f"{index}\t{name}\t{seed}\t")
            journal.flush()  # what kills the process leaves this behind
            try:
                outcome, text = run_call(targets[name], seed), ""
            except FindingError as finding:
                outcome, text = "finding", str(finding)
            except Exception as error:  # of the fuzzer: its rules or oracles have a hole
                outcome, text = "finding", f"the fuzzer failed: {type(error).__name__}: {error}"
            journal.write(f"{outcome}\t{json.dumps(text)}\n")


def limit_memory() -> None:
    """Not under a sanitizer, whose shadow takes terabytes of addresses: ASAN_OPTIONS limits it."""
    if not sanitized():
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))


def sanitized() -> list[str]:
    maps = Path("/proc/self/maps").read_text()
    return [name for name in ("asan", "ubsan", "tsan") if f"/lib{name}." in maps]


def read_journal(journal: Path) -> tuple[list[list[str]], list[str] | None]:
    """The calls that were done, and the one that was not."""
    lines = [line.split("\t") for line in journal.read_text().splitlines()]
    done = [line for line in lines if len(line) == 5]
    return done, lines[-1] if lines and len(lines[-1]) != 5 else None


def supervise(o: argparse.Namespace, journal: Path, deadline: float) -> tuple[int, str]:
    """Runs a process until it ends, hangs or the time is over. Exit status (0 where the time was
    over), and the last lines it said."""
    command = [sys.executable, __file__, "--calls", str(o.calls), "--seed", str(o.seed)]
    command += ["--first", str(o.first), "--journal", str(journal)]
    command += [part for name in o.op or [] for part in ("--op", name)]
    command += ["--also", o.also] if o.also else []
    with tempfile.TemporaryFile("w+") as said:
        process = subprocess.Popen(command, stdout=said, stderr=said)
        status = None
        while status is None:
            try:
                status = process.wait(timeout=0.5)
            except subprocess.TimeoutExpired:
                over = time.monotonic() > deadline
                if over or time.time() - journal.stat().st_mtime > HANG:
                    process.kill()
                    process.wait()
                    status = 0 if over else 1
        said.seek(0)
        return status, "".join(said.readlines()[-SHOWN_LINES:])


def repeat_command(o: argparse.Namespace, name: str, seed: str) -> str:
    also = f" --also {o.also}" if o.also else ""
    return f"python bench/fuzz.py{also} --repeat {name}:{seed}"


def fuzz(o: argparse.Namespace) -> tuple[list[list[str]], list[str]]:
    """All calls in one process after another, and the findings."""
    findings = []
    deadline = time.monotonic() + o.seconds
    with tempfile.TemporaryDirectory() as folder:
        journal = Path(folder) / "journal"
        journal.touch()
        while o.first < o.calls and time.monotonic() < deadline:
            status, said = supervise(o, journal, deadline)
            done, stopped_at = read_journal(journal)
            if status == 0:
                break
            if stopped_at is None:
                raise SystemExit(f"fuzz: the process ended with {status} outside of a call\n{said}")
            index, name, seed = stopped_at[:3]
            text = f"the process died or hung, exit status {status}\n{said}"
            o.first = int(index) + 1
            with journal.open("a") as file:
                file.write(f"finding\t{json.dumps(text)}\n")
        done, _ = read_journal(journal)
    for _, name, seed, outcome, text in done:
        if outcome == "finding":
            repeat = repeat_command(o, name, seed)
            findings.append(f"{name}, seed {seed}: {json.loads(text)}\n    {repeat}")
    return done, findings


def report(o: argparse.Namespace, done: list, findings: list[str], seconds: float) -> None:
    ops = {}
    for _, name, _, outcome, _ in done:
        ops.setdefault(name, Counter())[outcome] += 1
    keys = ("compared", "refused", "done", "finding")
    total = Counter(outcome for *_, outcome, _ in done)
    result = {
        "calls": len(done),
        **{key: total[key] for key in keys},
        "seconds": round(seconds, 1),
        "seed": o.seed,
        "processor": processor(),
        "torch": torch.__version__,
        "sanitizers": sanitized(),
        "ops": {
            name: {"calls": count.total(), **{key: count[key] for key in keys}}
            for name, count in ops.items()
        },
    }
    counts = ", ".join(f"{total[key]} {key}" for key in keys)
    print(f"{len(done)} calls of {len(ops)} ops in {seconds:.0f} s: {counts}")
    if o.json:
        o.json.write_text(json.dumps(result, indent=1) + "\n")
    for finding in findings:
        print(finding)


def main() -> int:
    o = options()
    targets = load_targets(o.also)
    if o.repeat:
        name, _, seed = o.repeat.rpartition(":")
        limit_memory()
        try:
            print(f"{o.repeat}: {run_call(targets[name], int(seed))}")
        except FindingError as finding:
            print(f"{o.repeat}: {finding}")
            return 1
        return 0
    names = o.op or list(targets)
    if strangers := [name for name in names if name not in targets]:
        raise SystemExit(f"fuzz: no op {strangers[0]}; there are {', '.join(targets)}")
    if o.journal:
        make_calls(o, targets, names)
        return 0
    start = time.monotonic()
    done, findings = fuzz(o)
    report(o, done, findings, time.monotonic() - start)
    missing = fuzz_calls.uncovered(targets)
    for name in missing:
        print(f"{name}: an op that no target calls; it needs a rule (fuzz_rules.py) and an oracle")
    return 1 if findings or missing else 0


if __name__ == "__main__":
    sys.exit(main())
