# SPDX-License-Identifier: Apache-2.0
"""The tiles of the CUDA expert products and the choice among them: host code, no GPU needed."""

import pytest
import tile_efficiency
import torch
from workloads import Workload

from unipool import _C

TILES = {tile["name"]: tile for tile in _C.gemm_tiles()}
KINDS = ("rows", "rows_bwd", "wgrad")
H100 = {"sms": 132, "shared_bytes": 227 * 1024, "arch": 90}
A100 = {"sms": 108, "shared_bytes": 163 * 1024, "arch": 80}
L40 = {"sms": 142, "shared_bytes": 99 * 1024, "arch": 89}
GPUS = {"H100": H100, "A100": A100, "L40": L40}
# M, D, F of the five scales
SCALES = {
    "182m": (96, 768, 3072),
    "469m": (192, 1024, 4096),
    "650m": (288, 1024, 4096),
    "830m": (384, 1024, 4096),
    "978m": (192, 1536, 6144),
}
REGISTERS, SHARED_PER_BLOCK_89 = 255, 99 * 1024
SCHEDULE_BYTES = 12 * 1024  # beside the pipeline


def choose(kind: str, rows: int, experts: int, n: int, k: int, **options) -> str | None:
    return _C.choose_gemm_tile(kind, rows, experts, n, k, **options)


def products(D: int, F: int) -> list[tuple[str, int, int]]:
    """(kind, n, k) of every product of a layer."""
    return [
        ("rows", 2 * F, D),
        ("rows", D, F),
        ("rows_bwd", F, D),
        ("rows_bwd", D, 2 * F),
        ("wgrad", 2 * F, D),
        ("wgrad", D, F),
    ]


# --- the table


def test_tiles_are_listed_in_order_of_size():
    assert [t["name"] for t in _C.gemm_tiles()] == ["t16", "t32", "t64", "t128", "f32"]
    halves = [t for t in TILES.values() if t["element_bytes"] == 2]
    assert [t["m"] for t in halves] == sorted(t["m"] for t in halves)
    assert sum(t["m"] <= 32 for t in halves) >= 1, "a tile for few tokens per expert"


@pytest.mark.parametrize("tile", TILES.values(), ids=TILES)
def test_a_tile_can_be_compiled(tile):
    """A warp's part is whole mma instructions (16 x 16 x 16), a stage whole rows of 16 bytes; sums
    and both operands' fragments fit the registers, two blocks of it a multiprocessor of 228 KB, one
    a block of the smallest supported GPU."""
    warps_m, warps_n = tile["warps"]
    assert tile["threads"] == 32 * warps_m * warps_n
    assert tile["m"] % (16 * warps_m) == 0
    assert tile["n"] % (16 * warps_n) == 0
    assert tile["k"] % 16 == 0
    assert tile["stages"] >= 3
    sums = tile["m"] * tile["n"] // tile["threads"]
    fragments = (tile["m"] // warps_m + tile["n"] // warps_n) * 16 * tile["element_bytes"] // 128
    assert sums + 2 * fragments <= REGISTERS - 40
    stage = (tile["m"] + tile["n"]) * tile["k"] * tile["element_bytes"]
    assert tile["shared_bytes"] == tile["stages"] * stage
    assert tile["shared_bytes"] >= tile["m"] * tile["n"] * tile["element_bytes"]  # the result
    assert 2 * (tile["shared_bytes"] + SCHEDULE_BYTES) <= 228 * 1024
    assert tile["shared_bytes"] + SCHEDULE_BYTES <= SHARED_PER_BLOCK_89


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_has_tiles_of_either_element_size(kind):
    for element_bytes in (2, 4):
        fitting = [
            t for t in TILES.values() if kind in t["kinds"] and t["element_bytes"] == element_bytes
        ]
        assert fitting, (kind, element_bytes)


# --- the choice


@pytest.mark.parametrize("gpu", GPUS.values(), ids=GPUS)
@pytest.mark.parametrize("scale", SCALES.values(), ids=SCALES)
@pytest.mark.parametrize("tokens", [1, 64, 1024, 8192, 32768, 131072, 2**24])
def test_the_chosen_tile_fits(gpu, scale, tokens):
    M, D, F = scale
    for kind, n, k in products(D, F):
        for element_bytes in (2, 4):
            for top_k in (1, 8):
                name = choose(kind, tokens * top_k, M, n, k, element_bytes=element_bytes, **gpu)
                tile = TILES[name]
                assert kind in tile["kinds"]
                assert tile["element_bytes"] == element_bytes
                assert tile["shared_bytes"] <= gpu["shared_bytes"]


@pytest.mark.parametrize("gpu", GPUS.values(), ids=GPUS)
@pytest.mark.parametrize("kind", ["rows", "rows_bwd"])
def test_rows_of_a_tile_grow_with_the_rows_an_expert(gpu, kind):
    """From the smallest tile to one of the two greatest, never back by more than one."""
    sizes = [
        TILES[choose(kind, int(t * 96), 96, 6144, 768, **gpu)]["m"]
        for t in (0.1, 1, 4, 8, 16, 64, 128, 512, 4096)
    ]
    assert sizes[0] == 16
    assert sizes[-1] >= 64
    assert sizes == sorted(sizes)


@pytest.mark.parametrize("scale", SCALES.values(), ids=SCALES)
def test_the_five_scales_on_an_h100(scale):
    """Rows an expert decide: below 64 a small tile, above 300 the greatest, on every product."""
    M, D, F = scale
    for kind, n, k in products(D, F):
        if kind != "wgrad":
            assert choose(kind, 2 * M, M, n, k, **H100) == "t16"
            assert TILES[choose(kind, 40 * M, M, n, k, **H100)]["m"] <= 64
        assert choose(kind, 300 * M, M, n, k, **H100) == "t128"
        assert choose(kind, 2048 * M, M, n, k, **H100) == "t128"


def test_a_single_wave_prefers_more_tiles():
    """Few tiles: small ones occupy more multiprocessors and finish sooner."""
    assert choose("rows", 256, 1, 1024, 1024, **H100) != "t128"
    assert choose("wgrad", 4096, 1, 768, 768, **H100) == "t64"


@pytest.mark.parametrize("kind", KINDS)
def test_edges(kind):
    for rows, experts, n, k in [
        (0, 1, 1, 1),  # no tokens
        (0, 1024, 8192, 1024),
        (1, 1024, 8, 8),  # fewer rows than experts
        (2**31 - 1, 1, 2**20, 2**20),  # sizes beyond 32 bits
        (2**31 - 1, 1024, 1, 1),
    ]:
        assert choose(kind, rows, experts, n, k) in TILES
        assert choose(kind, rows, experts, n, k, element_bytes=4) == "f32"


@pytest.mark.parametrize("kind", KINDS)
def test_the_slow_path_has_one_tile(kind):
    for rows in (0, 100, 10**6):
        assert choose(kind, rows, 96, 767, 3071, vector=False) == "t64"
        assert choose(kind, rows, 96, 767, 3071, vector=False, element_bytes=4) == "f32"


@pytest.mark.parametrize("kind", KINDS)
def test_shared_memory_limits_the_choice(kind):
    least = min(t["shared_bytes"] for t in TILES.values() if t["element_bytes"] == 2)
    assert choose(kind, 10**6, 96, 4096, 1024, shared_bytes=least) is None
    roomy = least + SCHEDULE_BYTES
    assert TILES[choose(kind, 192, 96, 4096, 1024, shared_bytes=roomy)]["shared_bytes"] == least


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("rowz", 1, 1, 1, 1), "kind"),
        (("rows", -1, 1, 1, 1), "rows"),
        (("rows", 1, 0, 1, 1), "experts"),
        (("rows", 1, 1, 0, 1), "n"),
        (("rows", 1, 1, 1, -5), "k"),
    ],
)
def test_malformed_calls(arguments, named):
    with pytest.raises(ValueError, match=rf"^choose_gemm_tile: {named} must be .*, got [^\n]*$"):
        choose(*arguments)


def test_expected_rate_of_a_tile():
    """Greater tiles do more a clock, up to what mma.sync can; float32 what FFMA can."""
    rates = [_C.gemm_tile_rate(name) for name in ("t16", "t32", "t64", "t128")]
    assert rates == sorted(rates)
    assert rates[-1] <= 2600
    assert _C.gemm_tile_rate("f32") <= 256
    with pytest.raises(ValueError, match=r"^gemm_tile_rate: tile must be one of .*, got t7$"):
        _C.gemm_tile_rate("t7")


# --- bench/tile_efficiency.py


@pytest.mark.parametrize("top_k", [1, 4])
def test_bytes_and_flops_of_a_layer(top_k):
    """forward 2P + 4TD + 8TkF, input gradient 2P + 4TD + 14TkF, both + 4TkD where k > 1; weight
    gradient 2P + 4TD + 6TkF; P parameters of the experts with rows. 6TkDF operations a pass."""
    T, D, F, M = 100, 24, 40, 8
    shape = Workload("test", T, D, F, M, top_k)
    counts = torch.tensor([0, 0, *[T * top_k // 4] * 4, 0, 0])
    combine = 4 * T * top_k * D * (top_k > 1)
    forward, backward = 8 * T * top_k * F, 14 * T * top_k * F
    up, down, hidden_bwd, input_bwd = tile_efficiency.layer_products(shape, counts)
    assert up.bytes + down.bytes == 2 * 3 * D * F * 4 + 4 * T * D + forward + combine
    dgrad = hidden_bwd.bytes + input_bwd.bytes
    assert dgrad == 2 * 3 * D * F * 4 + 4 * T * D + backward + combine
    wgrad = tile_efficiency.wgrad_products(shape, counts)
    assert sum(p.bytes for p in wgrad) == 2 * 3 * D * F * M + 4 * T * D + 6 * T * top_k * F
    for products in ((up, down), (hidden_bwd, input_bwd), wgrad):
        assert sum(p.flops for p in products) == 6 * T * top_k * D * F


@pytest.mark.parametrize("routing", tile_efficiency.ROUTINGS)
def test_drawn_rows(routing):
    shape = Workload("test", 500, 8, 8, 20, top_k=4)
    counts = tile_efficiency.draw_counts(shape, routing, torch.Generator().manual_seed(0))
    assert counts.sum() == 2000
    assert counts.max() <= 500
    empty = int((counts == 0).sum())
    assert empty == {"quarter": 15, "30% empty": 6}.get(routing, empty)
    if routing == "half to one":
        assert counts.max() == 500


def test_simulated_efficiency_of_a_product():
    """Three experts with 128, 1 and 0 rows on whole tiles of 128 columns."""
    product = tile_efficiency.Product("p", "rows", torch.tensor([128, 1, 0]), 256, 64, 1.0)
    got = tile_efficiency.simulate(product)
    m = TILES[got["tile"]]["m"]
    assert got["tiles"] == 2 * (128 // m + 1)
    assert got["tile_efficiency"] == pytest.approx(129 / (128 + m), abs=1e-4)
    assert 0 < got["wave_efficiency"] <= 1


def test_a_simulated_shape_stays_above_its_floor():
    shape = Workload("test", 4096, 256, 512, 16, layers=3)
    for routing in tile_efficiency.ROUTINGS:
        result = tile_efficiency.run(shape, routing)
        assert [p["pass"] for p in result["passes"]] == ["forward", "dgrad", "wgrad"]
        assert all(0 < p["predicted_share_of_floor"] < 1 for p in result["passes"])
        assert len(tile_efficiency.rows(result)) == 3
