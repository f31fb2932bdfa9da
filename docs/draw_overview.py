# SPDX-License-Identifier: Apache-2.0
"""Draws docs/overview.svg: L layers, L routers, one pool, and where the time of a step goes.

    python docs/draw_overview.py [--check]

The times are those of bench/results/pool_step_cpu.json and pool_step_parts.json. The picture has a
background of its own, so that it can be read on a page of any colour, and follows the reader's
colour scheme. With --check nothing is written; the exit status says whether it is up to date.
"""

import argparse
import json
import sys
from pathlib import Path
from xml.sax.saxutils import escape

DOCS = Path(__file__).resolve().parent
RESULTS = DOCS.parent / "bench" / "results"
PICTURE = DOCS / "overview.svg"
WIDTH, HEIGHT = 960, 360

STYLE = """
  .page { fill: #ffffff; stroke: #d0d7de; }
  .text { fill: #1f2328; }
  .soft { fill: #59636e; }
  .box { fill: #f6f8fa; stroke: #8c959f; }
  .idle { fill: #eaeef2; stroke: #afb8c1; }
  .bar { fill: #8c959f; }
  .a { fill: #0969da; } .a-line { stroke: #0969da; }
  .b { fill: #bc4c00; } .b-line { stroke: #bc4c00; }
  .c { fill: #1a7f37; } .c-line { stroke: #1a7f37; }
  .d { fill: #8250df; } .d-line { stroke: #8250df; }
  .p { fill: #0a3069; } .q { fill: #0550ae; } .r { fill: #0969da; } .s { fill: #54aeff; }
  .on { fill: #ffffff; }
  .line { fill: none; stroke-width: 1.6; }
  text { font-family: -apple-system, "Segoe UI", Helvetica, Arial, sans-serif; font-size: 13px; }
  .title { font-size: 15px; font-weight: 600; }
  .small { font-size: 12px; }
  @media (prefers-color-scheme: dark) {
    .page { fill: #0d1117; stroke: #3d444d; }
    .text { fill: #f0f6fc; }
    .soft { fill: #9198a1; }
    .box { fill: #151b23; stroke: #656c76; }
    .idle { fill: #212830; stroke: #3d444d; }
    .bar { fill: #656c76; }
    .a { fill: #4493f8; } .a-line { stroke: #4493f8; }
    .b { fill: #db6d28; } .b-line { stroke: #db6d28; }
    .c { fill: #3fb950; } .c-line { stroke: #3fb950; }
    .d { fill: #ab7df8; } .d-line { stroke: #ab7df8; }
    .p { fill: #a5d6ff; } .q { fill: #79c0ff; } .r { fill: #4493f8; } .s { fill: #1f6feb; }
    .on { fill: #0d1117; }
  }
"""
LAYER_COLORS, PART_COLORS = "abcd", "pqrs"  # classes of the style


def text(x: float, y: float, content: str, kind: str = "text", anchor: str = "start") -> str:
    return (
        f'<text x="{x:g}" y="{y:g}" class="{kind}" text-anchor="{anchor}">{escape(content)}</text>'
    )


def box(x: float, y: float, width: float, height: float, kind: str, radius: float = 4) -> str:
    return (
        f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="{radius:g}" '
        f'class="{kind}"/>'
    )


# --- the left half: the model

LAYER_X, LAYER_WIDTH, LAYER_HEIGHT, LAYER_STEP = 28, 214, 42, 62
ROUTER_WIDTH = 72
POOL_X, POOL_Y, CELL, CELLS = 348, 94, 30, (5, 4)  # rows and columns
NAMES = ("layer L", "layer …", "layer 2", "layer 1")
CHOSEN = (  # the experts of each layer, (row, column); the last two share one
    ((0, 1), (1, 3)),
    ((2, 0), (4, 2)),
    ((3, 1), (1, 0)),
    ((0, 3), (3, 1)),
)


def model() -> list[str]:
    shapes = [text(LAYER_X, 40, "L layers, L routers, one pool of M experts", "text title")]
    pool_width, pool_height = CELLS[1] * (CELL + 6) + 6, CELLS[0] * (CELL + 6) + 6
    arrows, users = [], {}
    for layer, name in enumerate(NAMES):
        y = 68 + layer * LAYER_STEP
        router_x = LAYER_X + LAYER_WIDTH - ROUTER_WIDTH - 6
        shapes.append(box(LAYER_X, y, LAYER_WIDTH, LAYER_HEIGHT, "box"))
        shapes.append(text(LAYER_X + 12, y + 19, name))
        shapes.append(text(LAYER_X + 12, y + 34, "attention, norm", "soft small"))
        shapes.append(box(router_x, y + 6, ROUTER_WIDTH, LAYER_HEIGHT - 12, LAYER_COLORS[layer]))
        shapes.append(text(router_x + ROUTER_WIDTH / 2, y + 25, "router", "on", "middle"))
        if layer + 1 < len(NAMES):
            middle, top = LAYER_X + LAYER_WIDTH / 2 - 40, y + LAYER_HEIGHT
            arrows.append(
                f'<path d="M{middle:g} {top + LAYER_STEP - LAYER_HEIGHT:g} V{top + 4:g} '
                f'm-4 5 l4 -5 l4 5" class="line" stroke="#8c959f"/>'
            )
        for row, column in CHOSEN[layer]:
            users[row, column] = users.get((row, column), "") + LAYER_COLORS[layer]
            start, end = LAYER_X + LAYER_WIDTH, POOL_X + 6 + column * (CELL + 6)
            height = POOL_Y + 6 + row * (CELL + 6) + CELL / 2
            bend = (start + POOL_X) / 2
            arrows.append(
                f'<path d="M{start:g} {y + LAYER_HEIGHT / 2:g} C{bend:g} {y + LAYER_HEIGHT / 2:g} '
                f'{bend:g} {height:g} {POOL_X:g} {height:g} H{end:g}" '
                f'class="line {LAYER_COLORS[layer]}-line"/>'
            )
    shapes.append(box(POOL_X, POOL_Y, pool_width, pool_height, "box", 6))
    shapes += arrows
    for row in range(CELLS[0]):
        for column in range(CELLS[1]):
            x, y = POOL_X + 6 + column * (CELL + 6), POOL_Y + 6 + row * (CELL + 6)
            colors = users.get((row, column), ("idle",))
            shapes += [
                box(x, y + i * CELL / len(colors), CELL, CELL / len(colors), color)
                for i, color in enumerate(colors)
            ]
    center = POOL_X + pool_width / 2
    shapes.append(text(center, POOL_Y - 12, "the pool", anchor="middle"))
    below = POOL_Y + pool_height
    shapes.append(text(center, below + 20, "any layer may use", "soft small", "middle"))
    shapes.append(text(center, below + 36, "any of its experts", "soft small", "middle"))
    shapes.append(
        text(
            LAYER_X,
            338,
            "A token goes to the k experts that the layer's router chooses.",
            "soft small",
        )
    )
    return shapes


# --- the right half: the time

TIME_X, BAR_X, BAR_WIDTH, ROW = 548, 672, 190, 26
DTYPE = "bfloat16"
WAYS = {  # timing of pool_step_cpu.json -> its label
    "grouped_mm": "grouped_mm",
    "unipool autograd": "L dense gradients",
    "unipool deferred": "UniPool",
}
PARTS = ("forward", "input gradients", "weight gradients")


def results(name: str) -> list[dict]:
    return json.loads((RESULTS / f"{name}.json").read_text())["results"]


def times() -> list[str]:
    parts = next(r for r in results("pool_step_parts") if r["dtype"] == DTYPE)
    step = next(
        r
        for r in results("pool_step_cpu")
        if r["dtype"] == DTYPE and r["layers"] == parts["layers"]
    )
    milliseconds = {t["name"]: 1e3 * t["median"] for t in step["timings"]}
    bars = {label: milliseconds[name] for name, label in WAYS.items()}
    bars["floor"] = 1e3 * step["floor"]
    scale = BAR_WIDTH / max(bars.values())
    shapes = [text(TIME_X, 40, "Where the time of a training step goes", "text title")]
    about = (
        f"{step['layers']} MoE layers, forward and backward, {step['experts']} experts, "
        f"{step['dtype']}, 2 CPU cores"
    )
    shapes.append(text(TIME_X, 60, about, "soft small"))
    for row, (label, value) in enumerate(bars.items()):
        y = 78 + row * ROW
        kind = "a" if label == "UniPool" else "bar"
        shapes.append(text(BAR_X - 10, y + 14, label, anchor="end"))
        shapes.append(box(BAR_X, y, value * scale, 18, kind, 2))
        shapes.append(text(BAR_X + value * scale + 8, y + 14, f"{value:,.0f} ms"))
    return shapes + shares(parts["share"], 78 + len(bars) * ROW + 26)


def shares(share: dict[str, float], y: float) -> list[str]:
    """One bar of all that UniPool's step consists of, and its legend."""
    shown = {part: share[part] for part in PARTS}
    shown["routers and all else"] = sum(v for part, v in share.items() if part not in PARTS)
    whole, x = WIDTH - 52 - TIME_X, float(TIME_X)
    shapes = [text(TIME_X, y, "UniPool's step, by part (one thread)")]
    for color, value in zip(PART_COLORS, shown.values(), strict=True):
        width = whole * value / sum(shown.values())
        shapes.append(box(x, y + 10, width - 2, 24, color, 2))
        if width > 40:
            shapes.append(text(x + width / 2 - 1, y + 27, f"{value:.0%}", "on", "middle"))
        x += width
    for index, (color, (part, value)) in enumerate(zip(PART_COLORS, shown.items(), strict=True)):
        left, top = TIME_X + index % 2 * 160, y + 48 + index // 2 * 20
        shapes.append(box(left, top, 10, 10, color, 2))
        shapes.append(text(left + 16, top + 9, f"{part} {value:.0%}", "soft small"))
    return shapes


def picture() -> str:
    label = (
        "L layers, each with a router of its own, send their tokens to one pool of M experts; "
        "and where the time of a training step goes."
    )
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        f'aria-label="{label}">',
        "<!-- drawn by docs/draw_overview.py; SPDX-License-Identifier: Apache-2.0 -->",
        f"<style>{STYLE}</style>",
        box(0.5, 0.5, WIDTH - 1, HEIGHT - 1, "page", 8),
        *model(),
        *times(),
        "</svg>",
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing")
    if not parser.parse_args().check:
        PICTURE.write_text(picture())
    elif not PICTURE.exists() or PICTURE.read_text() != picture():
        sys.exit("docs/overview.svg: run docs/draw_overview.py")


if __name__ == "__main__":
    main()
