# SPDX-License-Identifier: Apache-2.0
"""The results of a sweep on the terminal, and as results.json, table.md, pictures and a page."""

import json
from pathlib import Path

from rich.console import Console

from unipool.compare.figures import sweep_figures
from unipool.files import write_text
from unipool.report.page import document, escaped, image, paragraphs, table, write_pictures
from unipool.report.tables import add_row, markdown, terminal, with_spread
from unipool.terminal import say

_HEAD = (
    "model",
    "pools × experts",
    "k",
    "expert parameters",
    "active",
    "validation loss (nats/token)",
    "difference to vanilla",
    "seeds",
)
_NOTES = (
    "Mean ± standard deviation over seeds. A difference is taken seed by seed to the layer-private "
    "model of the same granularity, whose runs had the same text, held-out text and order; "
    "negative is better.",
    "A model's name: its router, pools × experts per pool, experts per token (k), and its balance "
    "loss with the micro-batch that the load is of (0: this one, 1: the last).",
)
_FIGURES = {
    "differences": "Difference to the layer-private model: mean, standard deviation and each seed",
    "pools": "By the number of pools",
    "pool-size": "By the size of one pool",
    "loss": "Training loss, mean over seeds",
}


def _spread(statistics: dict, form: str) -> str:
    """Of {"mean", "std", "n"}; "–" without a value."""
    if statistics["mean"] is None:
        return "–"
    return with_spread(statistics["mean"], statistics["std"], form)


def _difference(entry: dict, form: str) -> str:
    """Nothing for a baseline, which would differ from itself."""
    return "" if entry["name"] == entry["baseline"] else _spread(entry["difference"], form)


def _experts(entry: dict) -> str:
    return f"{entry['params_expert'] / 1e6:.2f}M"


def _seeds(entry: dict) -> str:
    return f"{entry['val_loss']['n']}/{len(entry['runs'])}"


def rows(results: dict) -> list[list[str]]:
    """Text of one row per model, in the order of the head."""
    return [
        [
            entry["label"],
            f"{entry['pools']} × {entry['pool_size']}",
            str(entry["granularity"]),
            _experts(entry),
            f"{entry['params_active'] / 1e6:.2f}M",
            _spread(entry["val_loss"], ".4f"),
            _difference(entry, "+.4f"),
            _seeds(entry),
        ]
        for entry in results["variants"]
    ]


def failures(results: dict) -> list[str]:
    """One line per run that failed."""
    return [
        f"{entry['label']} seed {run['seed']} failed: {run['reason']}"
        for entry in results["variants"]
        for run in entry["runs"]
        if run["status"] == "failed"
    ]


def write_results(folder: Path, results: dict) -> Path:
    """Write results.json, table.md, the pictures and report.html; returns the page's path."""
    folder = Path(folder)
    write_text(folder / "results.json", json.dumps(results, indent=1) + "\n")
    write_text(folder / "table.md", markdown(_HEAD, rows(results)))
    sections = ""
    for name, picture in write_pictures(folder, sweep_figures(results)).items():
        sections += f"<h2>{_FIGURES[name]}</h2>\n{image(name, picture)}\n"
    page = folder / "report.html"
    body = "<h2>Results</h2>\n" + table(_HEAD, rows(results)) + paragraphs(failures(results))
    body += paragraphs([*_NOTES, budget(results)]) + sections
    versions = f"unipool {results['unipool']}, PyTorch {results['torch']}"
    write_text(
        page, document("Expert pools compared", f"{body}<footer>{escaped(versions)}</footer>\n")
    )
    return page


def budget(results: dict) -> str:
    """What every run had in common, in a sentence."""
    o = results["options"]
    sequences = o["batch_size"] * o.get("accumulate", 1)
    tokens = o["steps"] * sequences * o["seq_len"]
    text = ", ".join(o.get("data", ())) or "the source of Python's standard library"
    return (
        f"Scale {results['scale']}; each run: {o['steps']:,} steps of {sequences} sequences of "
        f"{o['seq_len']} tokens ({tokens / 1e6:,.2f} M tokens) of {text}, learning rate "
        f"{o['lr']:g} to {o['min_lr']:g}; seeds {', '.join(map(str, results['seeds']))}."
    )


def show(console: Console, results: dict, page: Path) -> None:
    """The table, narrow enough for 80 columns, the failures and the place of the page."""
    head = ("model", "experts", "val loss (nats)", "to vanilla", "seeds")
    shown = terminal(head, left=("model",))
    for entry in results["variants"]:
        loss, to_vanilla = _spread(entry["val_loss"], ".3f"), _difference(entry, "+.3f")
        add_row(shown, entry["label"], _experts(entry), loss, to_vanilla, _seeds(entry))
    console.print(shown)
    for line in failures(results):
        say(line, console)
    say(budget(results), console)
    say(f"report: {page}", console)
