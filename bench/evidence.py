# SPDX-License-Identifier: Apache-2.0
"""The runs behind docs/evidence.md: a sweep with seeds, then the routing probe of its models.

    python bench/evidence.py [--out runs/evidence] [--jobs 2] [--json bench/results/evidence.json]

Trains what is missing in --out (about an hour on two cores with nothing else to do), probes what is
complete, and writes all numbers to --json, from which update_docs.py writes the tables.
"""

import argparse
import json
import time
from pathlib import Path

from harness import environment
from rich.console import Console

from unipool.analysis.probe import WEIGHTS, run_probe
from unipool.analysis.subject import Subject, load_subject
from unipool.analysis.summary import analyze
from unipool.compare.grid import Baseline, vanilla
from unipool.compare.presets import preset_variants, training, with_baselines
from unipool.compare.run import run_sweep
from unipool.compare.sweep import Sweep

PRESET, SCALE, SEEDS, STEPS = "evidence", "small", (0, 1, 2), 1000
COMMAND = (
    f"unipool compare --preset {PRESET} --scale {SCALE} --seeds {','.join(map(str, SEEDS))} "
    f"--steps {STEPS}"
)
PROBE_TOKENS, PROBE_SEEDS = 1 << 14, range(3)


def sweep() -> Sweep:
    baseline = Baseline.of(SCALE)
    variants = with_baselines(preset_variants([PRESET], baseline), baseline)
    options = training(SCALE) | {"steps": STEPS, "data": ()}
    return Sweep(SCALE, tuple(variants), SEEDS, options)


def probe(subject: Subject) -> dict[str, list[dict]]:
    """By the way of weighting random experts: loss increase and accuracy drop of each layer."""
    found = {}
    for weights in WEIGHTS:
        result = run_probe(subject.model, subject.batches, seeds=PROBE_SEEDS, weights=weights)
        found[weights] = [
            {name: getattr(layer, name) for name in ("layer", "loss_increase", "accuracy_drop")}
            for layer in result.layers
        ]
    return found


def routing(subject: Subject) -> list[dict]:
    """Of each layer: the share of tokens without a score above zero, and how its load spreads."""
    rows = analyze(subject.model, subject.batches()).numbers["layers"]
    return [{name: row[name] for name in ("layer", "silent", "dead", "gini")} for row in rows]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/evidence"))
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--json", type=Path, default=Path("bench/results/evidence.json"))
    arguments = parser.parse_args()
    begin, console = time.monotonic(), Console()
    resume = (arguments.out / "sweep.json").exists()
    results, stopped = run_sweep(
        sweep(), arguments.out, jobs=arguments.jobs, resume=resume, console=console
    )
    if stopped is not None:
        raise SystemExit(128 + stopped)
    baseline = Baseline.of(SCALE)
    probed = {vanilla(baseline).name, *(v.name for v in preset_variants(["main"], baseline))}
    probes = []
    for entry in results["variants"]:
        for run in entry["runs"] if entry["name"] in probed else []:
            subject = load_subject(arguments.out / run["folder"], None, tokens=PROBE_TOKENS)
            about = {"model": entry["name"], "seed": run["seed"]}
            probes.append(about | {"probe": probe(subject), "routing": routing(subject)})
            console.print(f"probed {entry['label']} seed {run['seed']}", highlight=False)
    content = {
        "command": COMMAND,
        "environment": environment(),
        "sweep": results,
        "probe": {"tokens": PROBE_TOKENS, "seeds": len(PROBE_SEEDS), "models": probes},
    }
    arguments.json.write_text(json.dumps(content, indent=1) + "\n")
    console.print(f"{arguments.json} ({(time.monotonic() - begin) / 60:.0f} min)", highlight=False)


if __name__ == "__main__":
    main()
