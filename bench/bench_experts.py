# SPDX-License-Identifier: Apache-2.0
"""Levels L0 and L1: the expert products one by one, and one layer forward and backward.

    python bench/bench_experts.py [--device cuda] [--json FILE] [--routing R] [--rehearse]
    python bench/bench_experts.py --once SHAPE      each product once, for a profiler

L0 times the raw ops of a layer; its floor is max(FLOPs / 989 TFLOP/s, bytes / 3.35 TB/s) of an H100
by datasheet, whatever GPU runs it. L1 times a layer with its gradients against torch's grouped_mm
with compiled glue (eager without triton), an eager loop over experts, and dense matmuls of equal
FLOPs as the bound; its floor is the sum of the passes'. Every way's output and gradients are
compared, at full size, before anything is timed. The routing is given: skewed, or --routing;
operands are bfloat16. --device cpu and --rehearse run everything on a small shape.
"""

import argparse
from collections.abc import Callable
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path

import tile_efficiency
import torch
import workloads
from bench_ops import grouped_mm_layer
from harness import (
    Timing,
    interleave,
    interleave_on_gpu,
    relative_error,
    require_device,
    write_json,
)
from tile_efficiency import Product, as_pass, floor_of, layer_products, wgrad_products
from torch import Tensor
from torch.nn import functional as F
from workloads import ROUTINGS, SKEWED, Workload

from unipool import ops

SHAPES = [
    workloads.scale("182m", 131072, layers=1),
    workloads.scale("830m", 8192, layers=1),
    workloads.named("SonicMoE 7B, k 8"),
]
SMALL = workloads.named("ci pool")
BOUND = 2e-2  # relative, of bfloat16 results that are rounded at other places
# Least share of the floor, of a pass at a shape.
FLOORS = {("182m", "forward"): 0.55, ("830m", "forward"): 0.70}
PARAMETERS = ("y", "x", "weights", "gate_up", "down")

Layer = Callable[[Tensor, ops.Routing, Tensor, Tensor], Tensor]


def make_inputs(shape: Workload, device: str, routing: str) -> dict[str, Tensor]:
    torch.manual_seed(0)
    options = {"device": device, "dtype": torch.bfloat16}
    T, D, width, M = shape.tokens, shape.d_model, shape.d_ff, shape.experts
    return {
        "x": torch.randn(T, D, **options),
        "weights": torch.rand(T, shape.top_k, device=device) + 0.5,
        "gate_up": torch.randn(M, 2 * width, D, **options).mul_(D**-0.5),
        "down": torch.randn(M, D, width, **options).mul_(width**-0.5),
        "experts": workloads.draw_ids(shape, routing, torch.Generator().manual_seed(0), device),
        "grad": torch.randn(T, D, **options),
    }


# --- L0


def raw_calls(shape: Workload, i: dict[str, Tensor]) -> dict[str, Callable[[], object]]:
    """Name of a pass -> a call of its op; wgrad is both products."""
    raw = torch.ops.unipool
    plan = raw.dispatch_plan([i["experts"]], shape.experts)
    order, _, offsets = plan
    pool = (i["weights"], i["gate_up"], i["down"], *plan)
    _, preact = raw.expert_mlp(i["x"], *pool, True)
    _, _, grad_preact, hidden = raw.expert_mlp_bwd(i["grad"], *pool, preact)
    k = shape.top_k

    def wgrad() -> tuple[Tensor, Tensor]:
        return (
            raw.grouped_wgrad([grad_preact], [i["x"]], [order], [offsets], 0, k),
            raw.grouped_wgrad([i["grad"]], [hidden], [order], [offsets], k, 0),
        )

    return {
        "forward": lambda: raw.expert_mlp(i["x"], *pool, True),
        "dgrad": lambda: raw.expert_mlp_bwd(i["grad"], *pool, preact),
        "wgrad": wgrad,
    }


def products_of(shape: Workload, counts: Tensor) -> dict[str, list[Product]]:
    """By pass."""
    up, down, hidden_bwd, input_bwd = layer_products(shape, counts)
    return {
        "forward": [up, down],
        "dgrad": [hidden_bwd, input_bwd],
        "wgrad": wgrad_products(shape, counts),
    }


def time_way(name: str, way: Callable[[], object], runs: int, device: str) -> Timing:
    if device == "cuda":
        return interleave_on_gpu({name: way}, warmup=10, runs=runs)[0][0]
    return interleave({name: way}, warmup=0, runs=runs)[0]


def _milliseconds(seconds: float | None) -> str:
    return "unknown" if seconds is None else f"{1e3 * seconds:.3f} ms"


def judge(shape: Workload, name: str, share: float) -> str:
    """pass, short, or - where no floor is set."""
    wanted = FLOORS.get((shape.name, name))
    if wanted is None:
        return "-"
    return "pass" if share >= wanted else "short"


def bench_products(shape: Workload, i: dict[str, Tensor], runs: int, device: str) -> list[dict]:
    counts = i["experts"].flatten().bincount(minlength=shape.experts).cpu()
    products = products_of(shape, counts)
    expect = as_pass if tile_efficiency.TILES else floor_of  # the tiles are known to the extension
    results = []
    for name, way in raw_calls(shape, i).items():
        timing = time_way(name, way, runs, device)
        passed = expect(name, products[name])
        flops = sum(product.flops for product in products[name])
        share = passed["floor_seconds"] / timing.median
        result = {
            "timing": asdict(timing),
            **passed,
            "flops_per_second": flops / timing.median,
            "share_of_floor": share,
            "verdict": judge(shape, name, share),
        }
        print(
            f"  {timing}  floor {1e3 * passed['floor_seconds']:.3f} ms ({passed['floor_bound']}), "
            f"{share:.0%} of it; predicted {_milliseconds(passed.get('predicted_seconds'))}; "
            f"{flops / timing.median / 1e12:.0f} TFLOP/s; {result['verdict']}"
        )
        results.append(result)
    return results


# --- L1


def eager_loop(x: Tensor, routing: ops.Routing, gate_up: Tensor, down: Tensor) -> Tensor:
    """Expert by expert, as most model code has it; the pool is taken apart once, so that the
    backward pass does not make a gradient of the whole pool for each expert."""
    y = torch.zeros_like(x, dtype=torch.float32)
    for e, (into, back) in enumerate(zip(gate_up.unbind(), down.unbind(), strict=True)):
        token, slot = (routing.experts == e).nonzero(as_tuple=True)
        gate, up = F.linear(x[token], into).chunk(2, dim=-1)
        out = F.linear(F.silu(gate) * up, back)
        y.index_add_(0, token, out * routing.weights[token, slot, None])
    return y.to(x.dtype)


def dense(shape: Workload, device: str) -> Callable[[], None]:
    """Matmuls of the layer's FLOPs, forward and both gradients: x [T k, D] x [D, 3F] each."""
    options = {"device": device, "dtype": torch.bfloat16}
    x = torch.randn(shape.rows, shape.d_model, **options)
    w = torch.randn(shape.d_model, 3 * shape.d_ff, **options)
    out = torch.empty(shape.rows, 3 * shape.d_ff, **options)

    def run() -> None:
        for _ in range(3):
            torch.mm(x, w, out=out)

    return run


def layer_step(layer: Layer, i: dict[str, Tensor]) -> Callable[[], tuple[Tensor, ...]]:
    """A step that returns y and the gradients of x, the router weights and the pool."""
    leaves = [i[name].requires_grad_() for name in PARAMETERS[1:]]
    x, weights, gate_up, down = leaves

    def step() -> tuple[Tensor, ...]:
        y = layer(x, ops.Routing(weights, i["experts"], None, None), gate_up, down)
        return y.detach(), *torch.autograd.grad(y, leaves, i["grad"])

    return step


def check(ways: dict[str, Callable[[], tuple[Tensor, ...]]]) -> None:
    """All ways against the first, in norm; in pieces, for a pool's gradient in float64 is large."""
    names = list(ways)
    wanted = ways[names[0]]()
    for name in names[1:]:
        for what, got, due in zip(PARAMETERS, ways[name](), wanted, strict=True):
            pieces = zip(got.chunk(16), due.chunk(16), strict=True)
            error = max(relative_error(a, b) for a, b in pieces if b.any())
            if not error <= BOUND:
                raise RuntimeError(f"{name}: {what}: relative error {error:.2e}, not timed")


def bench_layer(ways: dict[str, Callable], floor: float, runs: int, device: str) -> list[dict]:
    timings = interleave(ways, warmup=2, runs=runs, device=device)
    for t in timings:
        print(
            f"  {t}  {t.median / timings[0].median:6.2f}x ours  floor {1e3 * floor:.3f} ms, "
            f"{floor / t.median:.0%} of it"
        )
    return [asdict(t) | {"floor_seconds": floor} for t in timings]


def layer_ways(shape: Workload, i: dict[str, Tensor], device: str, compiler: str) -> dict:
    """Name -> a step. All but the last have been compared."""
    compiled = torch.compile(grouped_mm_layer, backend=compiler, dynamic=False)
    glue = "compiled" if compiler == "inductor" else "eager"
    layers = {
        "unipool": ops.expert_mlp,
        f"grouped_mm, {glue} glue": compiled,
        "eager loop": eager_loop,
    }
    ways = {name: layer_step(layer, i) for name, layer in layers.items()}
    check(ways)
    return ways | {"dense matmul, equal FLOPs": dense(shape, device)}


def bench(
    shape: Workload, runs: int, device: str, compiler: str = "inductor", routing: str = SKEWED
) -> dict:
    print(f"\n{shape.name}  T={shape.tokens} D={shape.d_model} F={shape.d_ff} M={shape.experts} "
          f"k={shape.top_k}, {routing} routing")  # fmt: skip
    inputs = make_inputs(shape, device, routing)
    with torch.no_grad():
        products = bench_products(shape, inputs, runs, device)
    floor = sum(passed["floor_seconds"] for passed in products)
    ways = layer_ways(shape, inputs, device, compiler)
    layer = bench_layer(ways, floor, min(runs, 20), device)
    return {**asdict(shape), "routing": routing, "products": products, "layer": layer}


def run_once(shape: Workload) -> None:
    """Each product once, for a profiler to look at."""
    with torch.no_grad():
        for way in raw_calls(shape, make_inputs(shape, "cuda", SKEWED)).values():
            way()
    torch.cuda.synchronize()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    parser.add_argument("--runs", type=int, default=50, help="counted runs of a call")
    parser.add_argument("--routing", default=SKEWED, choices=ROUTINGS, help="[%(default)s]")
    parser.add_argument("--rehearse", action="store_true", help="a small shape, two runs")
    parser.add_argument("--once", choices=[shape.name for shape in SHAPES], help="time nothing")
    arguments = parser.parse_args()
    require_device(arguments.device)
    if arguments.once:
        run_once(next(shape for shape in SHAPES if shape.name == arguments.once))
        return
    small = arguments.rehearse or arguments.device == "cpu"
    runs = 2 if arguments.rehearse else arguments.runs
    compiler = "inductor" if find_spec("triton") and not small else "eager"
    if arguments.device == "cuda":
        print(torch.cuda.get_device_name())
    results: list[dict] = []
    for shape in [SMALL] if small else SHAPES:
        results.append(bench(shape, runs, arguments.device, compiler, arguments.routing))
        if arguments.json:
            write_json(arguments.json, results)
    short = [p for r in results for p in r["products"] if p["verdict"] == "short"]
    count = sum(len(r["products"]) for r in results)
    print(f"\n{count} passes timed, {len(short)} fall short of their floor")


if __name__ == "__main__":
    main()
