# SPDX-License-Identifier: Apache-2.0
"""What pages with pictures are made of: one file that needs nothing beside it."""

import base64
import html
import io
from collections.abc import Iterable, Sequence
from pathlib import Path

from matplotlib.figure import Figure

from unipool.files import write_bytes
from unipool.terminal import printable

STYLE = """body { font: 16px/1.5 system-ui, sans-serif; color: #1b1b1b; background: #fff;
  max-width: 66rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.2rem; margin-top: 2rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: 0.9rem; }
th, td { padding: 0.35rem 0.7rem; text-align: right; border-bottom: 1px solid #ddd; }
th { vertical-align: bottom; }
th:first-child, td:first-child { text-align: left; white-space: nowrap; }
td { font-variant-numeric: tabular-nums; }
img { max-width: 100%; height: auto; display: block; margin: 1rem 0; }
pre { background: #f5f5f5; padding: 0.8rem; overflow-x: auto; font-size: 0.85rem; }
footer { color: #666; font-size: 0.85rem; margin-top: 2rem; }
"""

COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")  # Okabe and Ito
PLOT = {  # matplotlib's settings for every picture
    "font.size": 10,
    "axes.titlesize": 12,
    "axes.titleweight": "bold",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "svg.fonttype": "none",
}


def png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150)
    return buffer.getvalue()


def write_pictures(folder: Path, figures: dict[str, Figure]) -> dict[str, bytes]:
    """Write each figure as <name>.png into `folder`; returns the pictures by name."""
    pictures = {name: png(figure) for name, figure in figures.items()}
    for name, picture in pictures.items():
        write_bytes(folder / f"{name}.png", picture)
    return pictures


def escaped(text: object) -> str:
    """Text for a page: neither tags nor characters that a browser acts on or that are no text."""
    return html.escape(printable(text, lines=True))


def image(name: str, data: bytes) -> str:
    """An element that holds the picture itself."""
    encoded = base64.b64encode(data).decode("ascii")
    return f'<img alt="{escaped(name)}" src="data:image/png;base64,{encoded}">'


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Cells: text."""
    names = "".join(f"<th>{escaped(name)}</th>" for name in head)
    body = "".join(
        "<tr>" + "".join(f"<td>{escaped(cell)}</td>" for cell in row) + "</tr>\n" for row in rows
    )
    return (
        f'<div class="wide"><table>\n<thead><tr>{names}</tr></thead>\n'
        f"<tbody>\n{body}</tbody>\n</table></div>\n"
    )


def paragraphs(texts: Iterable[str]) -> str:
    return "".join(f"<p>{escaped(text)}</p>\n" for text in texts)


def document(title: str, body: str) -> str:
    """body: HTML; title: text."""
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escaped(title)}</title>
<style>
{STYLE}</style>
</head>
<body>
<h1>{escaped(title)}</h1>
{body}</body>
</html>
"""
