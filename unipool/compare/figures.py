# SPDX-License-Identifier: Apache-2.0
"""Pictures of a sweep."""

import itertools
from collections import defaultdict

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from unipool.report.page import COLORS, PLOT
from unipool.report.runs import loss_figure

_GRAY = "#666666"


def sweep_figures(results: dict) -> dict[str, Figure]:
    """Figures by file name, in the order of the report; those that there is something to show in.

    `results` as summary.summarize returns them.
    """
    variants = results["variants"]
    figures = {}
    if any(e["name"] != e["baseline"] and e["difference"]["n"] for e in variants):
        figures["differences"] = differences_figure(variants)
    for name, axis, family in (("pools", "pools", _total), ("pool-size", "pool_size", _pools)):
        if curves := _curves(variants, axis, family):
            figures[name] = axis_figure(curves, axis)
    if curves := _mean_runs(variants):
        figures["loss"] = loss_figure(curves)
    return figures


def differences_figure(variants: list[dict]) -> Figure:
    """A row per model: its validation loss less the baseline's, each seed and mean ± deviation."""
    losses = {e["name"]: _by_seed(e) for e in variants}
    entries = [e for e in variants if e["name"] != e["baseline"] and e["difference"]["n"]][::-1]
    with matplotlib.rc_context(PLOT):
        figure = Figure(figsize=(8, 1.4 + 0.4 * len(entries)), layout="constrained")
        axes = figure.add_subplot()
        for place, entry in enumerate(entries):
            base, own = losses[entry["baseline"]], losses[entry["name"]]
            dots = [own[seed] - base[seed] for seed in own if seed in base]
            axes.plot(dots, [place] * len(dots), "o", color=COLORS[0], alpha=0.4)
            axes.errorbar(
                entry["difference"]["mean"],
                place,
                xerr=entry["difference"]["std"] or 0.0,
                fmt="D",
                color=COLORS[1],
                capsize=4,
            )
        axes.axvline(0, color=_GRAY, linewidth=0.8)
        axes.set_yticks(range(len(entries)), labels=[e["label"] for e in entries])
        axes.set_xlabel("validation loss less that of the layer-private model (nats per token)")
    return figure


def axis_figure(curves: dict[str, list[dict]], axis: str) -> Figure:
    """Difference to the baseline, mean ± deviation, against a number; a line a family of models."""
    with matplotlib.rc_context(PLOT):
        figure = Figure(figsize=(8, 4), layout="constrained")
        axes = figure.add_subplot()
        for color, (name, entries) in zip(itertools.cycle(COLORS), curves.items(), strict=False):
            axes.errorbar(
                [e[axis] for e in entries],
                [e["difference"]["mean"] for e in entries],
                yerr=[e["difference"]["std"] or 0.0 for e in entries],
                fmt="o-",
                color=color,
                capsize=4,
                label=name,
            )
        axes.axhline(0, color=_GRAY, linestyle=":", label="layer-private model")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_xlabel({"pools": "pools G", "pool_size": "experts M of a pool"}[axis])
        axes.set_ylabel("difference in validation loss (nats per token)")
        axes.legend(frameon=False)
    return figure


def _by_seed(entry: dict) -> dict[int, float]:
    return {r["seed"]: r["val_loss"] for r in entry["runs"] if r["status"] == "complete"}


def _total(entry: dict) -> str:
    return f"{entry['pools'] * entry['pool_size']} experts in all"


def _pools(entry: dict) -> str:
    return f"{entry['pools']} pool{'s' if entry['pools'] > 1 else ''}"


def _curves(variants: list[dict], axis: str, family) -> dict[str, list[dict]]:
    """Models with results that differ in `axis` alone, three or more, by what they share."""
    found = defaultdict(list)
    for entry in variants:
        if entry["difference"]["n"] and entry["name"] != entry["baseline"]:
            balance = f"{entry['balance']} balance, delay {entry['delay']}"
            name = f"{entry['router']}, {family(entry)}, k {entry['granularity']}, {balance}"
            found[name].append(entry)
    return {
        name: sorted(entries, key=lambda e: e[axis])
        for name, entries in found.items()
        if len({e[axis] for e in entries}) > 2
    }


def _mean_runs(variants: list[dict]) -> list[dict]:
    """A curve a model as report.loss_figure takes it: the mean over the seeds that are complete."""
    curves = []
    for entry in variants:
        runs = [run for run in entry["runs"] if run["status"] == "complete"]
        if runs:
            points = np.mean([run["train_loss"] for run in runs], axis=0).tolist()
            mean = entry["val_loss"]["mean"]
            curves.append({"name": entry["label"], "train_loss": points, "val_loss": mean})
    return curves
