# SPDX-License-Identifier: Apache-2.0
"""Tiles of the expert products on an H100, by simulation: no GPU is used and no time is measured.

    python bench/tile_efficiency.py [--json FILE]

For each shape and routing the rows of every expert are drawn, and each product of a layer gets the
tile that its launcher would choose: useful over computed multiplications (tiles), fullness of the
waves (waves) and predicted seconds = max(bytes / BANDWIDTH, computed FLOPs / rate of the tile /
waves). The floor of a pass is max(FLOPs / PEAK, bytes / DATASHEET_BANDWIDTH). All in bfloat16.
"""

import argparse
from dataclasses import dataclass
from pathlib import Path

import torch
from harness import write_json
from torch import Tensor

try:
    from unipool import _C
except ImportError:  # op libraries of another Python: floors, but no simulation
    _C = None

PEAK, DATASHEET_BANDWIDTH = 989e12, 3.35e12
BANDWIDTH = 3.0e12  # what a copy reaches
SMS, CLOCK = 132, 1.755e9
SHARED_BYTES, SCHEDULE_BYTES = 228 * 1024, 12 * 1024  # of a multiprocessor; of a block
TILES = {tile["name"]: tile for tile in _C.gemm_tiles()} if _C else {}


@dataclass(frozen=True)
class Shape:
    name: str
    tokens: int
    d_model: int
    d_ff: int
    experts: int
    top_k: int = 1
    layers: int = 1  # that share the pool; a weight gradient sums over them

    @property
    def rows(self) -> int:
        return self.tokens * self.top_k


SHAPES = [
    *[Shape("182m", t, 768, 3072, 96, 1, 12) for t in (8192, 32768, 131072)],
    *[Shape("469m", t, 1024, 4096, 128, 1, 24) for t in (16384, 65536)],
    *[Shape("650m", t, 1024, 4096, 288, 1, 36) for t in (16384, 65536)],
    *[Shape("830m", t, 1024, 4096, 384, 1, 48) for t in (8192, 32768)],
    Shape("978m", 16384, 1536, 6144, 192, 1, 24),
    Shape("SonicMoE 7B", 24576, 1536, 256, 128, 8),
    Shape("SonicMoE 7B", 24576, 1536, 1024, 32, 2),
    Shape("Qwen3-30B-A3B", 32768, 2048, 768, 128, 8),
    Shape("OLMoE", 32768, 2048, 1024, 64, 8),
]


# --- routings: the probability of each expert in one layer


def uniform(experts: int, generator: torch.Generator) -> Tensor:
    return torch.ones(experts)


def zipf(experts: int, generator: torch.Generator) -> Tensor:
    """Probability 1 / rank, ranks shuffled."""
    ranks = 1 + torch.randperm(experts, generator=generator)
    return 1.0 / ranks


def quarter(experts: int, generator: torch.Generator) -> Tensor:
    """Each layer on M/4 experts of its own."""
    return (torch.randperm(experts, generator=generator) < experts // 4).float()


def half_to_one(experts: int, generator: torch.Generator) -> Tensor:
    chances = torch.ones(experts)
    chances[torch.randint(experts, (), generator=generator)] = experts - 1
    return chances


def thirty_percent_empty(experts: int, generator: torch.Generator) -> Tensor:
    return (torch.randperm(experts, generator=generator) >= 3 * experts // 10).float()


ROUTINGS = {
    "uniform": uniform,
    "zipf": zipf,
    "quarter": quarter,
    "half to one": half_to_one,
    "30% empty": thirty_percent_empty,
}


def draw_counts(shape: Shape, routing: str, generator: torch.Generator) -> Tensor:
    """[M] rows of each expert in one layer, their sum T k, none above T: k independent draws a
    token, what an expert gets beyond T handed to the others."""
    chances = ROUTINGS[routing](shape.experts, generator)
    counts = torch.zeros(shape.experts, dtype=torch.long)
    while missing := shape.rows - int(counts.sum()):
        open_to = torch.where(counts < shape.tokens, chances, 0.0)
        drawn = torch.multinomial(open_to, missing, replacement=True, generator=generator)
        counts += drawn.bincount(minlength=shape.experts)
        counts.clamp_(max=shape.tokens)
    return counts


# --- products


@dataclass(frozen=True)
class Product:
    """[rows, n] summed over k or, for a weight gradient, [experts, n, k] summed over rows. bytes:
    least traffic with DRAM; rows: those of each expert."""

    name: str
    kind: str
    rows: Tensor
    n: int
    k: int
    bytes: float

    @property
    def flops(self) -> float:
        return 2.0 * int(self.rows.sum()) * self.n * self.k


def layer_products(shape: Shape, counts: Tensor) -> list[Product]:
    """Forward and input gradient of one layer."""
    T, N, D, F = shape.tokens, shape.rows, shape.d_model, shape.d_ff
    matrix = 2.0 * D * F * int((counts > 0).sum())  # one of three, of the experts with rows
    out = 2 * T * D + 4 * N * D * (shape.top_k > 1)  # sorted rows written and summed
    return [
        Product("up", "rows", counts, 2 * F, D, 2 * matrix + 2 * T * D + 6 * N * F),
        Product("down", "rows", counts, D, F, matrix + 2 * N * F + out),
        Product("hidden_bwd", "rows_bwd", counts, F, D, matrix + 2 * T * D + 10 * N * F),
        Product("input_bwd", "rows_bwd", counts, D, 2 * F, 2 * matrix + 4 * N * F + out),
    ]


def wgrad_products(shape: Shape, counts: Tensor) -> list[Product]:
    """Of all layers at once, written in bfloat16; counts: rows of an expert in all of them."""
    T, N, D, F = shape.tokens, shape.rows, shape.d_model, shape.d_ff
    matrix = 2.0 * D * F * shape.experts  # zeros are written too
    operands = shape.layers * 2 * T * D
    return [
        Product("wgrad gate_up", "wgrad", counts, 2 * F, D,
                2 * matrix + operands + shape.layers * 4 * N * F),
        Product("wgrad down", "wgrad", counts, D, F,
                matrix + operands + shape.layers * 2 * N * F),
    ]  # fmt: skip


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
    flops = sum(product.flops for product in products)
    moved = sum(product.bytes for product in products)
    return {
        "pass": name,
        "floor_seconds": max(flops / PEAK, moved / DATASHEET_BANDWIDTH),
        "floor_bound": "flops" if flops / PEAK >= moved / DATASHEET_BANDWIDTH else "bytes",
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


def run(shape: Shape, routing: str) -> dict:
    generator = torch.Generator().manual_seed(0)
    layers = [draw_counts(shape, routing, generator) for _ in range(shape.layers)]
    up, down, hidden_bwd, input_bwd = layer_products(shape, layers[0])
    return {
        **vars(shape),
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
