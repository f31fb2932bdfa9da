# SPDX-License-Identifier: Apache-2.0
"""Plots and a self-contained HTML page of a comparison of runs (the schema of metrics.json)."""

import re
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colorbar import Colorbar
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from unipool.files import write_text
from unipool.report.page import (
    COLORS,
    PLOT,
    document,
    escaped,
    image,
    paragraphs,
    table,
    write_pictures,
)

_STYLES = ("-", "--", "-.", ":", (0, (5, 1)), (0, (3, 1, 1, 1)))
COLUMNS = (
    ("model", "name", "{}"),
    ("pools", "num_pools", "{:,}"),
    ("experts per pool", "pool_size", "{:,}"),
    ("parameters", "params_total", "{:,}"),
    ("in experts", "params_expert", "{:,}"),
    ("active", "params_active", "{:,}"),
    ("validation loss (nats/token)", "val_loss", "{:.4f}"),
    ("bits per byte", "val_bits_per_byte", "{:.4f}"),
    ("tokens/s", "tokens_per_second", "{:,.0f}"),
)


def table_rows(runs: list[dict]) -> list[list[str]]:
    """One row of text a run, in the order of COLUMNS; "–" where nothing was measured."""
    return [
        ["–" if run[key] is None else form.format(run[key]) for _, key, form in COLUMNS]
        for run in runs
    ]


def loss_figure(runs: list[dict]) -> Figure:
    """Training loss against the step, a line per run, and the final validation loss as a marker."""
    with matplotlib.rc_context(PLOT):
        figure = Figure(figsize=(8, 4.5), layout="constrained")
        axes = figure.add_subplot()
        shown = []
        for index, run in enumerate(runs):
            points = np.array([p for p in run["train_loss"] if np.isfinite(p[1])]).reshape(-1, 2)
            color, style = COLORS[index % len(COLORS)], _STYLES[index % len(_STYLES)]
            axes.plot(*points.T, color=color, linestyle=style, linewidth=1.8, label=run["name"])
            last = points[-1, 0] if len(points) else 0
            axes.plot(last, run["val_loss"], "o", color=color, markeredgecolor="white")
            shown += [*points[len(points) // 20 :, 1], run["val_loss"]]
        low, high = min(shown), max(shown)
        axes.set_ylim(low - 0.05 * (high - low), high + 0.05 * (high - low) + 1e-6)
        axes.set_xlabel("optimizer step")
        axes.set_ylabel("cross-entropy (nats per token)")
        axes.set_title("Training loss (lines) and final validation loss (dots)", loc="left")
        axes.legend(frameon=False)
    return figure


def load_figure(run: dict) -> Figure:
    """Heat map layer × expert: the share of a layer's tokens that went to each expert of its pool.

    In multiples of the uniform share 1 / M, so that 1 means balanced whatever the pool's size.
    """
    load = np.asarray(run["load"], dtype=float)
    layers, experts = load.shape
    with matplotlib.rc_context({**PLOT, "axes.grid": False}):
        figure, axes, bar = load_map(load * experts)
        axes.set_yticks(range(0, layers, max(1, layers // 12)))
        axes.set_title(f"{run['name']}: expert load over the validation text", loc="left")
        bar.outline.set_visible(False)
    return figure


def load_map(relative: np.ndarray) -> tuple[Figure, Axes, Colorbar]:
    """The heat map of loads [L, M] in multiples of a layer's uniform share; NaN stays empty."""
    figure = Figure(figsize=(8, 1.6 + 0.34 * max(len(relative), 3)), layout="constrained")
    axes = figure.add_subplot()
    top = max(2.0, np.nanmax(relative))
    image = axes.imshow(relative, aspect="auto", cmap="cividis", vmin=0, vmax=top)
    axes.set_xlabel("expert of the layer's pool")
    axes.set_ylabel("layer")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=16))
    bar = figure.colorbar(image, ax=axes, pad=0.02)
    bar.set_label("load ÷ uniform share")
    return figure, axes, bar


def write_report(folder: Path, title: str, notes: list[str], metrics: dict, samples: dict) -> Path:
    """Write report.html and its PNGs into `folder`; returns the page's path.

    notes: paragraphs above the table. samples: run name -> generated text.
    """
    folder = Path(folder)
    runs = metrics["runs"]
    figures = {"loss": loss_figure(runs)}
    for run in runs:
        if run["load"]:
            figures["load-" + re.sub(r"[^a-z0-9]+", "-", run["name"].lower())] = load_figure(run)
    images = [image(*entry) for entry in write_pictures(folder, figures).items()]
    page = folder / "report.html"
    write_text(page, _page(title, notes, metrics, images, samples))
    return page


def _page(title: str, notes: list[str], metrics: dict, images: list[str], samples: dict) -> str:
    texts = "".join(
        f"<h3>{escaped(name)}</h3>\n<pre>{escaped(text)}</pre>\n" for name, text in samples.items()
    )
    versions = f"unipool {metrics['unipool']}, PyTorch {metrics['torch']}, seed {metrics['seed']}"
    text = _BODY.format(
        notes=paragraphs(notes),
        table=table([name for name, _, _ in COLUMNS], table_rows(metrics["runs"])),
        loss=images[0],
        loads="\n".join(images[1:]),
        texts=texts,
        versions=escaped(versions),
    )
    return document(title, text)


_BODY = """{notes}<h2>Results</h2>
{table}<h2>Loss</h2>
{loss}
<h2>Expert load</h2>
<p>Each row is a layer, each column an expert of the pool that the layer draws on; the colour is the
share of the layer's tokens that the expert received, in multiples of an equal share. Under a
NormRouter, a token that scores zero for every expert counts for expert 0, with weight zero.</p>
{loads}
<h2>Generated text</h2>
{texts}<footer>{versions}</footer>
"""
