# SPDX-License-Identifier: Apache-2.0
"""Pictures of an analysis and of a probe."""

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from unipool.analysis.probe import Probe
from unipool.analysis.summary import Analysis
from unipool.report.page import COLORS, PLOT
from unipool.report.runs import load_map

_BLUE, _ORANGE, _GREEN = COLORS[:3]
_STYLE = PLOT | {"axes.grid": False}


def analysis_figures(analysis: Analysis) -> dict[str, Figure]:
    """Figures by file name, in the order of the report."""
    numbers, arrays = analysis.numbers, analysis.arrays
    figures = {"load": load_figure(arrays["load"], arrays["layers"])}
    figures["entropy"] = entropy_figure(numbers["layers"])
    if len(arrays["layers"]) > 1:
        figures["information"] = pair_figure(
            arrays["information"],
            arrays["information_shuffled"],
            arrays["layers"],
            "mutual information (bits)",
        )
    if np.isfinite(arrays["jaccard"]).any():
        figures["jaccard"] = pair_figure(
            arrays["jaccard"], arrays["jaccard_shuffled"], arrays["layers"], "Jaccard index"
        )
    figures["similarity"] = similarity_figure(analysis)
    if any(row["scale"] is not None for row in numbers["layers"]):
        figures["scale"] = scale_figure(numbers["layers"])
    return figures


def _new(width: float, height: float) -> Figure:
    return Figure(figsize=(width, height), layout="constrained")


def _name_layers(axis, layers: np.ndarray) -> None:
    step = max(1, -(-len(layers) // 16))
    axis.set_ticks(range(0, len(layers), step), labels=layers[::step])


def load_figure(load: np.ndarray, layers: np.ndarray) -> Figure:
    """Heat map layer × expert of the load in multiples of the layer's uniform share."""
    shown = np.where(load < 0, np.nan, load).astype(float)
    relative = shown / np.maximum(np.nanmean(shown, axis=1, keepdims=True), 1e-12)
    with matplotlib.rc_context(_STYLE):
        figure, axes, _ = load_map(relative)
        _name_layers(axes.yaxis, layers)
    return figure


def entropy_figure(rows: list[dict]) -> Figure:
    """Entropy of the gates of one token and of the load over all, by layer, with its limit."""
    with matplotlib.rc_context(_STYLE):
        figure = _new(8, 3.2)
        axes = figure.add_subplot()
        places = range(len(rows))
        axes.plot(
            places, np.log2([row["experts"] for row in rows]), ":", color="#666", label="limit"
        )
        axes.plot(
            places,
            [row["load_entropy"] for row in rows],
            "s-",
            color=_GREEN,
            label="load, over all tokens",
        )
        axes.plot(
            places,
            [row["gate_entropy"] for row in rows],
            "o-",
            color=_BLUE,
            label="gates, mean of a token",
        )
        axes.set_ylim(bottom=0)
        axes.set_xlabel("layer")
        axes.set_ylabel("entropy (bits)")
        _name_layers(axes.xaxis, np.array([row["layer"] for row in rows]))
        axes.legend(frameon=False, ncols=3, loc="lower left", bbox_to_anchor=(0, 1))
    return figure


def pair_figure(
    measured: np.ndarray, shuffled: np.ndarray, layers: np.ndarray, what: str
) -> Figure:
    """A matrix layer × layer as measured, beside the same with the tokens shuffled."""
    top = max(np.nanmax(measured), np.nanmax(shuffled), 1e-9)
    with matplotlib.rc_context(_STYLE):
        figure = _new(8, 4.0)
        panels = figure.subplots(1, 2)
        pairs = ((measured, "measured"), (shuffled, "tokens shuffled"))
        for axes, (matrix, title) in zip(panels, pairs, strict=True):
            image = axes.imshow(matrix, cmap="viridis", vmin=0, vmax=top)
            axes.set_title(title, loc="left")
            axes.set_xlabel("layer")
            _name_layers(axes.xaxis, layers)
            _name_layers(axes.yaxis, layers)
        panels[0].set_ylabel("layer")
        figure.colorbar(image, ax=panels, pad=0.02, shrink=0.8).set_label(what)
    return figure


def similarity_figure(analysis: Analysis) -> Figure:
    """Cosines of the experts of one pool as a heat map; of several pools, their distributions."""
    pools = [row["pool"] for row in analysis.numbers["pools"]]
    matrices = [analysis.arrays[f"similarity_{pool}"] for pool in pools]
    with matplotlib.rc_context(_STYLE):
        if len(pools) == 1:
            figure = _new(5.5, 4.5)
            axes = figure.add_subplot()
            matrix = np.where(np.eye(len(matrices[0]), dtype=bool), np.nan, matrices[0])
            top = max(np.nanmax(np.abs(matrix)), 1e-9) if len(matrix) > 1 else 1.0
            image = axes.imshow(matrix, cmap="RdBu_r", vmin=-top, vmax=top)
            axes.set_xlabel("expert")
            axes.set_ylabel("expert")
            figure.colorbar(image, ax=axes, pad=0.02).set_label("cosine of the weights")
            return figure
        figure = _new(8, 3.2)
        axes = figure.add_subplot()
        axes.boxplot([m[np.triu_indices(len(m), 1)] for m in matrices], whis=(0, 100))
        axes.set_xticks(range(1, len(pools) + 1), labels=pools)
        axes.set_xlabel("pool")
        axes.set_ylabel("cosine of two experts' weights")
    return figure


def scale_figure(rows: list[dict]) -> Figure:
    """NormRouter's learned scale sigma by layer; it starts at 1."""
    with matplotlib.rc_context(_STYLE):
        figure = _new(8, 2.8)
        axes = figure.add_subplot()
        values = [np.nan if row["scale"] is None else row["scale"] for row in rows]
        axes.plot(range(len(rows)), values, "o-", color=_BLUE)
        axes.axhline(1.0, color="#666", linestyle=":")
        axes.set_xlabel("layer")
        axes.set_ylabel("scale σ")
        _name_layers(axes.xaxis, np.array([row["layer"] for row in rows]))
    return figure


def probe_figure(probe: Probe) -> Figure:
    """Loss increase and accuracy drop by layer, mean and standard deviation over seeds."""
    places = range(len(probe.layers))
    panels = (
        ("loss_increase", "loss_spread", 1.0, "loss increase (nats)", _BLUE),
        ("accuracy_drop", "accuracy_spread", 100.0, "accuracy drop (points)", _ORANGE),
    )
    with matplotlib.rc_context(_STYLE):
        figure = _new(8, 5)
        for axes, (mean, spread, unit, label, color) in zip(
            figure.subplots(2, 1, sharex=True), panels, strict=True
        ):
            heights = [unit * getattr(layer, mean) for layer in probe.layers]
            errors = [unit * (getattr(layer, spread) or 0.0) for layer in probe.layers]
            axes.bar(places, heights, yerr=errors, color=color, capsize=3)
            axes.axhline(0, color="#666", linewidth=0.8)
            axes.set_ylabel(label)
        axes.set_xlabel("layer with random routing")
        _name_layers(axes.xaxis, np.array([layer.layer for layer in probe.layers]))
    return figure
