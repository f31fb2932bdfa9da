# SPDX-License-Identifier: Apache-2.0
"""An analysis as a folder: report.html, which needs nothing beside it, and the numbers."""

import io
import json
from pathlib import Path

import numpy as np

import unipool
from unipool.analysis.figures import analysis_figures
from unipool.analysis.summary import Analysis
from unipool.files import write_bytes, write_text
from unipool.report.page import document, escaped, image, paragraphs, table, write_pictures

_LAYER_COLUMNS = (
    ("layer", "layer", "{}"),
    ("pool", "pool", "{}"),
    ("router", "router", "{}"),
    ("experts", "experts", "{}"),
    ("k", "top_k", "{}"),
    ("gate entropy (bits)", "gate_entropy", "{:.3f}"),
    ("effective", "gate_effective", "{:.1f}"),
    ("load entropy (bits)", "load_entropy", "{:.3f}"),
    ("effective", "load_effective", "{:.1f}"),
    ("dead", "dead", "{}"),
    ("Gini", "gini", "{:.3f}"),
    ("silent tokens", "silent", "{:.2%}"),
    ("scale σ", "scale", "{:.3f}"),
)
_POOL_COLUMNS = (
    ("pool", "pool", "{}"),
    ("layers", "layers", "{}"),
    ("experts", "experts", "{}"),
    ("load entropy (bits)", "load_entropy", "{:.3f}"),
    ("effective", "load_effective", "{:.1f}"),
    ("dead", "dead", "{}"),
    ("Gini", "gini", "{:.3f}"),
    ("mean cosine of experts", "similarity", "{:.4f}"),
)
_TEXTS = {
    "load": (
        "Load",
        "Each row is a layer, each column an expert of the pool that the layer draws on; the "
        "colour is the expert's load in multiples of an equal share.",
    ),
    "entropy": (
        "Entropy",
        "Of the gates of one token (its scores divided by their sum), averaged over tokens: how "
        "undecided the router is. Of the load: how evenly all tokens together use the experts. "
        "2^H is the effective number of experts.",
    ),
    "information": (
        "Mutual information across layers",
        "How many bits the expert chosen in one layer tells about the one chosen in another, for "
        "the same token. An estimate from finite text is above zero even without any relation: "
        "what counts is the difference to the shuffled tokens.",
    ),
    "jaccard": (
        "Overlap across layers",
        "Mean Jaccard index of the sets of experts that a token gets in two layers of the same "
        "pool, beside the same for shuffled tokens.",
    ),
    "similarity": (
        "Similarity of experts",
        "Cosine of two experts' weights, all their matrices taken as one vector.",
    ),
    "scale": ("NormRouter scale", "The learned factor σ of each layer's scores; 1 at the start."),
}


def write_analysis(folder: Path, analysis: Analysis, title: str, notes: list[str]) -> Path:
    """Write report.html, analysis.json, analysis.npz and the pictures; returns the page's path."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    pictures = write_pictures(folder, analysis_figures(analysis))
    sections = [_section(name, picture) for name, picture in pictures.items()]
    arrays = io.BytesIO()
    np.savez_compressed(arrays, **analysis.arrays)
    write_bytes(folder / "analysis.npz", arrays.getvalue())
    write_text(folder / "analysis.json", json.dumps(analysis.numbers, indent=1) + "\n")
    page = folder / "report.html"
    write_text(page, _page(analysis.numbers, title, notes, sections))
    return page


def _section(name: str, picture: bytes) -> str:
    heading, text = _TEXTS[name]
    return f"<h2>{escaped(heading)}</h2>\n<p>{escaped(text)}</p>\n{image(heading, picture)}\n"


def _cell(value, form: str) -> str:
    if isinstance(value, list):
        value = ", ".join(map(str, value))
    return "–" if value is None else form.format(value)


def _table(columns: tuple, rows: list[dict]) -> str:
    names = [name for name, _, _ in columns]
    return table(names, [[_cell(row[key], form) for _, key, form in columns] for row in rows])


def _cross_layer_rows(cross: dict) -> list[dict]:
    names = (("mutual information (bits)", "information"), ("Jaccard index", "jaccard"))
    return [
        {"what": what, "measured": cross[name], "shuffled": cross[f"{name}_shuffled"]}
        for what, name in names
    ]


def _page(numbers: dict, title: str, notes: list[str], sections: list[str]) -> str:
    cross_columns = (
        ("mean over pairs of layers", "what", "{}"),
        ("measured", "measured", "{:.4f}"),
        ("tokens shuffled", "shuffled", "{:.4f}"),
    )
    body = _BODY.format(
        notes=paragraphs(notes),
        layers=_table(_LAYER_COLUMNS, numbers["layers"]),
        pools=_table(_POOL_COLUMNS, numbers["pools"]),
        cross=_table(cross_columns, _cross_layer_rows(numbers["cross_layer"])),
        sections="".join(sections),
        version=escaped(f"unipool {unipool.__version__}"),
    )
    return document(title, body)


_BODY = """{notes}<h2>Layers</h2>
{layers}<p>Dead: experts without a single token of this text. Silent tokens: all their scores are
zero, which only a NormRouter can do; the load counts them for the experts of lowest id. Layers are
compared below by the experts with a weight above zero.</p>
<h2>Pools</h2>
{pools}<h2>Across layers</h2>
{cross}{sections}<footer>{version}</footer>
"""
