# SPDX-License-Identifier: Apache-2.0
"""The pool step: L layers of norm -> router -> one shared pool, forward and backward.

    python bench/pool_step.py [--layers 4 12 24] [--dtype float32 bfloat16] [--json FILE] ...

Ours in three weight-gradient modes against torch's grouped_mm with autograd and, if transformers is
installed, its experts implementation; dense matmuls of equal FLOPs as the bound. The routers are
the same in all ways; the norm is a LayerNorm, one kernel of PyTorch each way. Gradients
are compared before anything is timed. The floor of a pass is max(FLOPs / rate, bytes / bandwidth),
rates and bandwidth measured in turn with the ways: two passes per layer read the weights, one
weight gradient of all layers writes the pool's gradient once, and the routers' three products per
layer are in float32.
"""

import argparse
import ctypes
import gc
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from bench_ops import grouped_mm_layer
from harness import (
    Timing,
    as_result,
    interleave,
    require_close,
    require_device,
    synchronize,
    write_json,
)
from rehearsal import is_rehearsal
from torch import Tensor, nn
from torch.nn import functional as F
from workloads import Workload, named

from unipool.nn import ExpertPool, NormRouter, pooled_moe
from unipool.nn.pool_pass import WEIGHT_GRADS
from unipool.ops import Routing, costs

CPU = named("cpu")
BOUNDS = {"float32": 1e-5, "bfloat16": 3e-2, "float16": 5e-3}


class PoolStep(nn.Module):
    """The layers. chained: each reads its predecessor's output, as in a model; otherwise all read
    the model's input, so that a rounding difference cannot change a later layer's routing."""

    def __init__(self, shape: Workload, dtype: torch.dtype, device: str) -> None:
        super().__init__()
        options = {"dtype": dtype, "device": device}
        self.shape = shape
        self.chained = True
        self.pool = ExpertPool(shape.experts, shape.d_model, shape.d_ff, **options)
        self.routers = nn.ModuleList(
            NormRouter(shape.d_model, shape.experts, shape.top_k, **options)
            for _ in range(shape.layers)
        )

    def forward(self, x: Tensor, experts: Callable[[Tensor, Routing], Tensor]) -> Tensor:
        y = x
        for router in self.routers:
            h = F.layer_norm(y if self.chained else x, x.shape[-1:])
            y = y + pooled_moe(h, router, experts)[0]
        return y

    def ours(self, mode: str) -> Callable[[Tensor, Routing], Tensor]:
        self.pool.weight_grad = mode
        return self.pool.begin_pass()

    def grouped_mm(self) -> Callable[[Tensor, Routing], Tensor]:
        weights = self.pool.gate_up_proj, self.pool.down_proj
        return lambda x, routing: grouped_mm_layer(x, routing, *weights)

    def compiled_grouped_mm(self) -> Callable[[Tensor, Routing], Tensor]:
        weights = self.pool.gate_up_proj, self.pool.down_proj
        layer = torch.compile(grouped_mm_layer, dynamic=False)
        return lambda x, routing: layer(x, routing, *weights)

    def transformers_experts(self) -> Callable[[Tensor, Routing], Tensor]:
        from transformers import MixtralConfig
        from transformers.models.mixtral.modeling_mixtral import MixtralExperts

        s = self.shape
        config = MixtralConfig(
            hidden_size=s.d_model,
            intermediate_size=s.d_ff,
            num_local_experts=s.experts,
            num_experts_per_tok=s.top_k,
            experts_implementation="grouped_mm",
        )
        with torch.device("meta"):
            module = MixtralExperts(config)
        module.gate_up_proj, module.down_proj = self.pool.gate_up_proj, self.pool.down_proj
        # Silent slots, of weight 0, have to go somewhere.
        return lambda x, r: module(x, r.experts.long().clamp(min=0), r.weights.to(x.dtype))


def release_free_memory() -> None:
    """To the system, where the C library can: what an earlier way freed would hide the peak."""
    gc.collect()
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)


class PeakMemory:
    """Greatest memory above that at the start: of the process (CPU, sampled) or of the GPU."""

    def __init__(self, device: str) -> None:
        self.cuda = device == "cuda"

    def __enter__(self) -> "PeakMemory":
        if self.cuda:
            torch.cuda.reset_peak_memory_stats()
            self.start = torch.cuda.memory_allocated()
            return self
        import psutil

        release_free_memory()
        self.process = psutil.Process()
        self.start = self.peak = self.process.memory_info().rss
        self.stopping = threading.Event()
        self.thread = threading.Thread(target=self._sample)
        self.thread.start()
        return self

    def _sample(self) -> None:
        while not self.stopping.wait(0.002):
            self.peak = max(self.peak, self.process.memory_info().rss)

    def __exit__(self, *exception: object) -> None:
        if self.cuda:
            self.peak = torch.cuda.max_memory_allocated()
        else:
            self.stopping.set()
            self.thread.join()
        self.gib = (self.peak - self.start) / 2**30


@dataclass(frozen=True)
class Rates:
    """What this machine reaches now: FLOP/s of large dense matmuls, bytes/s of reading memory."""

    matmul: float
    float32_matmul: float
    read: float


def rate_sizes(device: str) -> tuple[int, int]:
    """Side of the matrices that matmul rates are measured with, elements that are read: large
    enough for full rates."""
    if is_rehearsal():
        return 64, 2**12
    return (8192, 2**28) if device == "cuda" else (2048, 2**26)


def rate_ways(dtype: torch.dtype, device: str) -> dict[str, Callable[[], object]]:
    """One for each field of Rates, to be timed in turn with what they are a bound for."""
    side, elements = rate_sizes(device)

    def matmul(dtype: torch.dtype) -> Callable[[], object]:
        a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
        out = torch.empty_like(a)
        return lambda: torch.mm(a, b, out=out)

    numbers = torch.ones(elements, device=device)
    return {
        "matmul": matmul(dtype),
        "float32_matmul": matmul(torch.float32),
        "read": lambda: numbers.sum(),
    }


def rates_of(timings: list[Timing], device: str) -> Rates:
    side, elements = rate_sizes(device)
    amounts = {"matmul": 2 * side**3, "float32_matmul": 2 * side**3, "read": 4 * elements}
    return Rates(**{t.name: amounts[t.name] / t.median for t in timings if t.name in amounts})


def dense(shape: Workload, dtype: torch.dtype, device: str) -> Callable[[], None]:
    """Dense matmuls of the step's FLOPs: three passes of x [T k, D] x [D, 3F] a layer."""
    rows = shape.tokens * shape.top_k
    x = torch.randn(rows, shape.d_model, device=device).to(dtype)
    w = torch.randn(shape.d_model, 3 * shape.d_ff, device=device).to(dtype)
    out = torch.empty(rows, 3 * shape.d_ff, dtype=dtype, device=device)

    def run() -> None:
        for _ in range(3 * shape.layers):
            torch.mm(x, w, out=out)

    return run


def make_ways(model: PoolStep, x: Tensor, grad: Tensor, peers: list[str]) -> dict:
    """name -> a step that returns the gradients of the pool and of x."""

    def step(make: Callable[[], Callable]) -> tuple[Tensor, ...]:
        for parameter in model.parameters():
            parameter.grad = None
        x.grad = None
        model(x, make()).backward(grad)
        return model.pool.gate_up_proj.grad, model.pool.down_proj.grad, x.grad

    ways = {f"unipool {m}": lambda m=m: step(lambda: model.ours(m)) for m in WEIGHT_GRADS}
    available = {
        "grouped_mm": model.grouped_mm,
        "grouped_mm compiled": model.compiled_grouped_mm,
        "transformers grouped_mm": model.transformers_experts,
    }
    ways |= {name: lambda f=available[name]: step(f) for name in peers}
    return ways


def floor_seconds(shape: Workload, itemsize: int, rates: Rates) -> float:
    """A layer's forward, input gradients and router (float32), and one weight gradient for all."""
    T, k, D, F_, M = shape.tokens, shape.top_k, shape.d_model, shape.d_ff, shape.experts
    passes = [
        costs.expert_mlp(T, k, D, F_, M, itemsize),
        costs.expert_mlp_bwd(T, k, D, F_, M, itemsize),
    ]
    router = costs.router_logits(T, D, M, 4) + costs.router_logits_bwd(T, D, M, 4)
    per_layer = router.flops / rates.float32_matmul
    per_layer += sum(cost.seconds(rates.matmul, rates.read) for cost in passes)
    wgrad = costs.expert_wgrad(T, k, D, F_, M, itemsize, shape.layers)
    return shape.layers * per_layer + wgrad.seconds(rates.matmul, rates.read)


def bench(shape: Workload, dtype_name: str, arguments: argparse.Namespace) -> dict:
    device, dtype = arguments.device, getattr(torch, dtype_name)
    torch.manual_seed(0)
    model = PoolStep(shape, dtype, device)
    x = torch.randn(shape.tokens, shape.d_model, device=device).to(dtype).requires_grad_()
    grad = torch.randn_like(x)
    ways = make_ways(model, x, grad, arguments.peers)
    model.chained = False
    check(ways, dtype_name)
    model.chained = True
    peaks = {}
    for name, way in ways.items():
        model.zero_grad()
        x.grad = None
        with PeakMemory(device) as peak:
            way()
            synchronize(device)
        peaks[name] = peak.gib
    ways["dense matmul, equal FLOPs"] = dense(shape, dtype, device)
    bounds = rate_ways(dtype, device)
    timings = interleave(ways | bounds, warmup=1, runs=arguments.runs, device=device)
    rates = rates_of(timings, device)
    floor = floor_seconds(shape, dtype.itemsize, rates)
    timings = [t for t in timings if t.name in ways]
    return report(shape, dtype_name, timings, peaks, floor, rates)


def check(ways: dict[str, Callable], dtype_name: str) -> None:
    """All ways against ours with plain autograd."""
    wanted = [g.clone() for g in ways["unipool autograd"]()]
    for name, way in ways.items():
        for what, got, want in zip(("gate_up", "down", "x"), way(), wanted, strict=True):
            require_close(f"{name}: gradient of {what}", got, want, BOUNDS[dtype_name])


def report(
    shape: Workload,
    dtype_name: str,
    timings: list[Timing],
    peaks: dict[str, float],
    floor: float,
    rates: Rates,
) -> dict:
    ours = timings[0]
    print(
        f"\npool step  L={shape.layers} T={shape.tokens} D={shape.d_model} F={shape.d_ff} "
        f"M={shape.experts} k={shape.top_k} {dtype_name}\n"
        f"  measured here: matmul {rates.matmul / 1e9:.0f} GFLOP/s (float32 "
        f"{rates.float32_matmul / 1e9:.0f}), read {rates.read / 1e9:.1f} GB/s; "
        f"floor {1e3 * floor:.0f} ms, {1e3 * ours.median / shape.layers:.1f} ms per layer"
    )
    for t in timings:
        peak = f"{peaks[t.name]:6.2f} GiB" if t.name in peaks else ""
        print(
            f"  {t}  {t.median / ours.median:6.2f}x ours {t.median / floor:6.2f}x floor  {peak}",
        )
    sizes = {n: v for n, v in asdict(shape).items() if n not in ("name", "tags")}
    case = {"case": "pool step", "dtype": dtype_name, **sizes}
    ratios = {t.name: t.median / ours.median for t in timings}
    return as_result(
        case,
        timings,
        ratio_to_ours=ratios,
        floor=floor,
        ours_over_floor=ours.median / floor,
        peak_gib=peaks,
        matmul_flops=rates.matmul,
        float32_matmul_flops=rates.float32_matmul,
        read_bandwidth=rates.read,
        seconds_per_layer=ours.median / shape.layers,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, nargs="+", default=[4, 12, 24])
    parser.add_argument("--dtype", nargs="+", default=["float32", "bfloat16"], choices=BOUNDS)
    parser.add_argument("--tokens", type=int, default=CPU.tokens)
    parser.add_argument("--d-model", type=int, default=CPU.d_model)
    parser.add_argument("--d-ff", type=int, default=CPU.d_ff)
    parser.add_argument("--experts", type=int, default=CPU.experts)
    parser.add_argument("--top-k", type=int, default=CPU.top_k)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument(
        "--peers",
        nargs="*",
        default=["grouped_mm", "transformers grouped_mm"],
        choices=["grouped_mm", "grouped_mm compiled", "transformers grouped_mm"],
    )
    parser.add_argument("--runs", type=int, default=7, help="counted runs of each way")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    arguments = parser.parse_args()
    require_device(arguments.device)
    results = []
    start = time.perf_counter()
    for dtype_name in arguments.dtype:
        for layers in arguments.layers:
            a = arguments
            shape = Workload("", a.tokens, a.d_model, a.d_ff, a.experts, a.top_k, layers)
            results.append(bench(shape, dtype_name, arguments))
            if arguments.json:
                write_json(arguments.json, results)
    print(f"\n{time.perf_counter() - start:.0f} s in all")


if __name__ == "__main__":
    main()
