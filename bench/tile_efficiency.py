# SPDX-License-Identifier: Apache-2.0
"""Tiles of the expert products on an H100, by simulation: no GPU is used and no time is measured.

    python bench/tile_efficiency.py [--json FILE]

For each shape and routing the rows of every expert are drawn, and each product of a layer gets the
tile that its launcher would choose: useful over computed multiplications (tiles), fullness of the
waves (waves) and predicted seconds = max(bytes / BANDWIDTH, computed FLOPs / rate of the tile /
waves). The floor of a pass is max(FLOPs / PEAK, bytes / DATASHEET_BANDWIDTH). All in bfloat16.
"""

import argparse
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from harness import write_json
from torch import Tensor
from workloads import ROUTINGS, WORKLOADS, Workload, draw_counts

from unipool.ops import costs
from unipool.ops.costs import Cost

try:
    from unipool import _C
except ImportError:  # op libraries of another Python: floors, but no simulation
    _C = None

PEAK, DATASHEET_BANDWIDTH = 989e12, 3.35e12
BANDWIDTH = 3.0e12  # what a copy reaches
SMS, CLOCK = 132, 1.755e9
SHARED_BYTES, SCHEDULE_BYTES = 228 * 1024, 12 * 1024  # of a multiprocessor; of a block
TILES = {tile["name"]: tile for tile in _C.gemm_tiles()} if _C else {}


# Each scale at two sizes or more, and what others publish figures for.
SHAPES = [w for w in WORKLOADS if {"paper", "peer"} & set(w.tags)]


# --- products


@dataclass(frozen=True)
class Product:
    """[rows, n] summed over k or, for a weight gradient, [experts, n, k] summed over rows. bytes:
    its part of the least traffic with DRAM; rows: those of each expert."""

    name: str
    kind: str
    rows: Tensor
    n: int
    k: int
    bytes: float

    @property
    def flops(self) -> float:
        return 2.0 * int(self.rows.sum()) * self.n * self.k


def layer_products(shape: Workload, counts: Tensor) -> list[Product]:
    """Forward and input gradient of one layer; their bytes add up to those of ops.costs."""
    T, N, D, F = shape.tokens, shape.rows, shape.d_model, shape.d_ff
    matrix = 2.0 * D * F * int((counts > 0).sum())  # one of three, of the experts with rows
    out = 2 * T * D + 4 * N * D * (shape.top_k > 1)  # sorted rows written and summed
    return [
        Product("up", "rows", counts, 2 * F, D, 2 * matrix + 2 * T * D + 6 * N * F),
        Product("down", "rows", counts, D, F, matrix + 2 * N * F + out),
        Product("hidden_bwd", "rows_bwd", counts, F, D, matrix + 2 * T * D + 10 * N * F),
        Product("input_bwd", "rows_bwd", counts, D, 2 * F, 2 * matrix + 4 * N * F + out),
    ]


def wgrad_products(shape: Workload, counts: Tensor) -> list[Product]:
    """Of all layers at once, written in bfloat16; counts: rows of an expert in all of them."""
    D, F = shape.d_model, shape.d_ff
    tokens, rows = shape.layers * shape.tokens, shape.layers * shape.rows
    sizes = {"rows": rows, "experts": shape.experts, "size": 2, "out": 2}
    gate_up = costs.grouped_wgrad(rows, tokens, n=2 * F, k=D, **sizes).bytes
    down = costs.grouped_wgrad(tokens, rows, n=D, k=F, **sizes).bytes
    return [
        Product("wgrad gate_up", "wgrad", counts, 2 * F, D, gate_up),
        Product("wgrad down", "wgrad", counts, D, F, down),
    ]


# --- simulation


def ceil_div(a: Tensor | int, b: int) -> Tensor | int:
    return -(-a // b)


def simulate(product: Product) -> dict:
    """The tile chosen, and what becomes of it with these rows."""
    total, experts = int(product.rows.sum()), len(product.rows)
    name = _C.choose_gemm_tile(product.kind, total, experts, product.n, product.k)
    tile = TILES[name]
    m, n, k = tile["m"], tile["n"], tile["k"]
    if product.kind == "wgrad":
        per_expert = ceil_div(product.n, m) * ceil_div(product.k, n)
        tiles = per_expert * int((product.rows > 0).sum())
        computed = 2.0 * per_expert * m * n * k * int(ceil_div(product.rows, k).sum())
    else:
        tiles = int(ceil_div(product.rows, m).sum()) * ceil_div(product.n, n)
        computed = 2.0 * tiles * m * n * k * ceil_div(product.k, k)
    resident = min(2, SHARED_BYTES // (tile["shared_bytes"] + SCHEDULE_BYTES))
    slots = SMS * resident
    waves = tiles / slots / ceil_div(tiles, slots)
    rate = SMS * CLOCK * _C.gemm_tile_rate(name)
    return {
        "product": product.name,
        "tile": name,
        "tiles": tiles,
        "tile_efficiency": round(product.flops / computed, 4),
        "wave_efficiency": round(waves, 4),
        "flops": product.flops,
        "bytes": product.bytes,
        "predicted_seconds": max(product.bytes / BANDWIDTH, computed / rate / waves),
    }


def floor_of(name: str, products: list[Product]) -> dict:
    """The floor of products in a row, taken as one: max over sums, not sum of maxima."""
    cost = sum((Cost(p.flops, p.bytes) for p in products), Cost(0.0, 0.0))
    return {
        "pass": name,
        "floor_seconds": cost.seconds(PEAK, DATASHEET_BANDWIDTH),
        "floor_bound": cost.bound(PEAK, DATASHEET_BANDWIDTH),
    }


def as_pass(name: str, products: list[Product]) -> dict:
    """A pass of products in a row: its floor and what the simulation predicts."""
    floor, parts = floor_of(name, products), [simulate(product) for product in products]
    predicted = sum(part["predicted_seconds"] for part in parts)
    return floor | {
        "predicted_seconds": predicted,
        "predicted_share_of_floor": round(floor["floor_seconds"] / predicted, 4),
        "products": parts,
    }


def run(shape: Workload, routing: str) -> dict:
    generator = torch.Generator().manual_seed(0)
    layers = [draw_counts(shape, routing, generator) for _ in range(shape.layers)]
    up, down, hidden_bwd, input_bwd = layer_products(shape, layers[0])
    return {
        **asdict(shape),
        "routing": routing,
        "passes": [
            as_pass("forward", [up, down]),
            as_pass("dgrad", [hidden_bwd, input_bwd]),
            as_pass("wgrad", wgrad_products(shape, sum(layers))),
        ],
    }


def rows(result: dict) -> list[str]:
    title = f"{result['name']} T={result['tokens']} k={result['top_k']} {result['routing']}"
    lines = []
    for p in result["passes"]:
        parts = "  ".join(
            f"{q['tile']:>4} {q['tile_efficiency']:4.0%} {q['wave_efficiency']:4.0%}"
            for q in p["products"]
        )
        lines.append(
            f"{title:<40}{p['pass']:<8}{1e3 * p['floor_seconds']:>8.3f} {p['floor_bound']:<6}"
            f"{1e3 * p['predicted_seconds']:>8.3f}{p['predicted_share_of_floor']:>6.0%}  {parts}"
        )
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    arguments = parser.parse_args()
    print(f"{'shape and routing':<40}{'pass':<8}{'floor':>8} ms    {'pred.':>8} share  "
          "tile, tiles, waves of each product")  # fmt: skip
    results = [run(shape, routing) for shape in SHAPES for routing in ROUTINGS]
    for result in results:
        print("\n".join(rows(result)))
    if arguments.json:
        write_json(arguments.json, results)


if __name__ == "__main__":
    main()
