# SPDX-License-Identifier: Apache-2.0
"""Level L0: the router and dispatch kernels on a GPU, beside the bandwidth of a copy.

    python bench/bench_kernels.py [--json FILE] [--runs N]

CUDA events around one call, 256 MB written before each so that L2 holds nothing of it, medians
[p10, p90]. Bytes by construction are what the kernels move to and from DRAM if nothing but the
reuse named in docs/kernels.md hits a cache; GB/s, the share of the copy's bandwidth (measured here)
and the floors refer to them. Necessary bytes are those that any implementation has to move. Every
op is compared with the CPU, at fewer tokens, before anything is timed.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from harness import Timing, environment, require_close, require_device
from torch import Tensor

TOKENS, WIDTH, CHECK_TOKENS = 65536, 1024, 512
WARM_UPS, FLUSH_BYTES, COPY_BYTES = 10, 256 * 10**6, 2**30
ROUTER_BLOCKS = 3 * 132  # of the float32 layouts up to M = 384: one wave, three a multiprocessor
PLAN_SPAN, PLAN_BLOCKS = 512, 4 * 132  # least slots of a block, most blocks
BOUNDS = {torch.float32: 1e-5, torch.bfloat16: 1e-2}
CALIBRATION, EPS = 3.0, 1e-8


@dataclass(frozen=True)
class Traffic:
    """Bytes of one call, to and from DRAM."""

    necessary: int
    moved: int


# --- bytes, by the formulas of docs/kernels.md; logits float32, rows bfloat16


def topk_bytes(tokens: int, experts: int, top_k: int) -> Traffic:
    """Logits in; weights and ids of the slots, load and importance out. Moved: partial sums too."""
    necessary = 4 * tokens * experts + 8 * tokens * top_k + 8 * experts
    return Traffic(necessary, necessary + 2 * 8 * ROUTER_BLOCKS * experts)


def topk_bwd_bytes(tokens: int, experts: int, top_k: int) -> Traffic:
    """Logits, ids, both gradients in; gradient of the logits out."""
    necessary = 8 * tokens * experts + 8 * tokens * top_k + 4 * experts
    return Traffic(necessary, necessary)


def plan_bytes(slots: int, experts: int) -> Traffic:
    """Ids in, order, inverse and offsets out. Moved: ids twice, and the blocks' counts written
    twice and read twice from DRAM."""
    blocks = min(max(-(-slots // PLAN_SPAN), 1), PLAN_BLOCKS)
    necessary = 12 * slots + 4 * (experts + 1)
    return Traffic(necessary, necessary + 4 * slots + 4 * 4 * blocks * experts)


def permute_bytes(tokens: int, top_k: int, width: int) -> Traffic:
    """Moved: a token's row is read once for each of its copies."""
    slots = tokens * top_k
    out = 2 * slots * width + 4 * slots
    return Traffic(2 * tokens * width + out, 2 * slots * width + out)


def unpermute_bytes(tokens: int, top_k: int, width: int) -> Traffic:
    """Rows, inverse and weights in; tokens out."""
    slots = tokens * top_k
    necessary = 2 * slots * width + 2 * tokens * width + 8 * slots
    return Traffic(necessary, necessary)


def unpermute_bwd_bytes(tokens: int, top_k: int, width: int) -> Traffic:
    """Tokens' gradient, rows, order, inverse, weights in; gradients of rows and weights out."""
    slots = tokens * top_k
    necessary = 2 * tokens * width + 2 * 2 * slots * width + 16 * slots
    return Traffic(necessary, necessary)


# --- calls


Arguments = list[object]


@dataclass(frozen=True)
class Call:
    """One row of the table. `arguments(tokens)` makes a raw op's arguments on the default device;
    floors: least share of the copy's bandwidth, most microseconds."""

    op: str
    shape: dict[str, int]
    traffic: Traffic
    arguments: Callable[[int], Arguments]
    min_share: float | None = None
    max_us: float | None = None

    @property
    def name(self) -> str:
        return f"{self.op} " + " ".join(f"{k}={v}" for k, v in self.shape.items())


def _logits(tokens: int, experts: int) -> Tensor:
    """On a grid of 1/128: experts tie exactly or differ by more than a rounding error."""
    return torch.randn(tokens, experts).mul(128).round().div(128)


def _ids(tokens: int, experts: int, top_k: int) -> Tensor:
    return torch.rand(tokens, experts).topk(top_k).indices.int()


def _plan(tokens: int, experts: int, top_k: int) -> tuple[Tensor, Tensor, Tensor]:
    return torch.ops.unipool.dispatch_plan([_ids(tokens, experts, top_k)], experts)


def _rows(rows: int, width: int) -> Tensor:
    return torch.randn(rows, width, dtype=torch.bfloat16)


def router_calls(experts: int, top_k: int) -> list[Call]:
    shape = {"T": TOKENS, "M": experts, "k": top_k}
    forward, backward = topk_bytes(*shape.values()), topk_bwd_bytes(*shape.values())

    def grads(tokens: int) -> Arguments:
        return [torch.randn(tokens, top_k), torch.randn(experts), _logits(tokens, experts)]

    def norm(tokens: int) -> Arguments:
        scale = torch.tensor(1.25)
        return [_logits(tokens, experts), scale, top_k, CALIBRATION, EPS, None, None]

    def norm_bwd(tokens: int) -> Arguments:
        ids, scale = _ids(tokens, experts, top_k), torch.tensor(1.25)
        return [*grads(tokens), scale, ids, CALIBRATION, EPS, None]

    def softmax(tokens: int) -> Arguments:
        return [_logits(tokens, experts), top_k, False, None, None]

    def softmax_bwd(tokens: int) -> Arguments:
        return [*grads(tokens), _ids(tokens, experts, top_k), False, None]

    return [
        Call("norm_topk", shape, forward, norm, min_share=0.85),
        Call("softmax_topk", shape, forward, softmax, min_share=0.85),
        Call("norm_topk_bwd", shape, backward, norm_bwd, min_share=0.80),
        Call("softmax_topk_bwd", shape, backward, softmax_bwd, min_share=0.80),
    ]


def plan_call(experts: int, layers: int) -> Call:
    def arguments(tokens: int) -> Arguments:
        return [[_ids(tokens, experts, 1) for _ in range(layers)], experts]

    shape = {"T": TOKENS, "M": experts, "k": 1, "layers": layers}
    traffic = plan_bytes(TOKENS * layers, experts)
    return Call("dispatch_plan", shape, traffic, arguments, max_us=30.0 if layers == 1 else None)


def row_calls(top_k: int, experts: int = 96) -> list[Call]:
    def permute(tokens: int) -> Arguments:
        return [_rows(tokens, WIDTH), _plan(tokens, experts, top_k)[0], top_k]

    def unpermute(tokens: int) -> Arguments:
        inverse = _plan(tokens, experts, top_k)[1]
        return [_rows(tokens * top_k, WIDTH), inverse, torch.rand(tokens, top_k)]

    def unpermute_bwd(tokens: int) -> Arguments:
        order, inverse, _ = _plan(tokens, experts, top_k)
        rows = _rows(tokens, WIDTH), _rows(tokens * top_k, WIDTH)
        return [*rows, order, inverse, torch.rand(tokens, top_k)]

    shape = {"T": TOKENS, "k": top_k, "D": WIDTH}
    sizes = tuple(shape.values())
    return [
        Call("permute", shape, permute_bytes(*sizes), permute, min_share=0.85),
        Call("unpermute", shape, unpermute_bytes(*sizes), unpermute, min_share=0.85),
        Call("unpermute_bwd", shape, unpermute_bwd_bytes(*sizes), unpermute_bwd),
    ]


def all_calls() -> list[Call]:
    calls = router_calls(384, 1) + router_calls(96, 8)
    calls += [plan_call(experts, layers) for experts in (96, 384) for layers in (1, 12)]
    return calls + row_calls(1) + row_calls(8)


# --- check and timing


def _run(call: Call, arguments: Arguments) -> list[Tensor]:
    results = getattr(torch.ops.unipool, call.op)(*arguments)
    return [results] if isinstance(results, Tensor) else list(results)


def _to_cuda(value: object) -> object:
    if isinstance(value, list):
        return [_to_cuda(v) for v in value]
    return value.cuda() if isinstance(value, Tensor) else value


def check(call: Call) -> None:
    """The op on the GPU against the CPU, at CHECK_TOKENS tokens."""
    arguments = call.arguments(CHECK_TOKENS)
    for i, (got, want) in enumerate(
        zip(_run(call, _to_cuda(arguments)), _run(call, arguments), strict=True)
    ):
        what = f"{call.name}: result {i}"
        if want.is_floating_point():
            require_close(what, got.cpu(), want, BOUNDS[want.dtype])
        elif not torch.equal(got.cpu(), want):
            raise RuntimeError(f"{what}: integers differ from the CPU's, not timed")


def time_on_gpu(name: str, way: Callable[[], object], runs: int) -> tuple[Timing, float]:
    """Seconds of a call, and the share of the GPU's time that the host needed to enqueue it all:
    only well below 1 was the GPU never idle inside a call."""
    flush = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device="cuda")
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(runs)]
    for _ in range(WARM_UPS):
        way()
    torch.cuda.synchronize()
    host = time.perf_counter()
    for start, end in events:
        flush.zero_()
        start.record()
        way()
        end.record()
    host = time.perf_counter() - host
    torch.cuda.synchronize()
    seconds = [1e-3 * start.elapsed_time(end) for start, end in events]
    deciles = statistics.quantiles(seconds, n=10)
    timing = Timing(name, statistics.median(seconds), deciles[0], deciles[-1], runs)
    return timing, host / (1e-3 * events[0][0].elapsed_time(events[-1][1]))


def copy_timing(total_bytes: int, runs: int) -> Timing:
    """A copy that reads and writes total_bytes together."""
    source = torch.zeros(total_bytes // 2, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return time_on_gpu("copy", lambda: target.copy_(source), runs)[0]


def judge(call: Call, microseconds: float, share: float) -> str:
    """pass, short, or - where no floor is set."""
    if call.min_share is not None:
        return "pass" if share >= call.min_share else "short"
    if call.max_us is not None:
        return "pass" if microseconds <= call.max_us else "short"
    return "-"


def bench(call: Call, copy_bandwidth: float, runs: int) -> dict:
    check(call)
    with torch.device("cuda"):
        arguments = call.arguments(TOKENS)
    timing, host_share = time_on_gpu(call.name, lambda: _run(call, arguments), runs)
    same = copy_timing(call.traffic.moved, runs)
    bandwidth = call.traffic.moved / timing.median
    share = bandwidth / copy_bandwidth
    result = {
        "op": call.op,
        **call.shape,
        "bytes_by_construction": call.traffic.moved,
        "bytes_necessary": call.traffic.necessary,
        "timing": asdict(timing),
        "bytes_per_second": bandwidth,
        "share_of_copy": share,
        "share_of_copy_necessary": call.traffic.necessary / timing.median / copy_bandwidth,
        "copy_of_same_bytes_seconds": same.median,
        "host_share": host_share,
        "floor": {"share_of_copy": call.min_share, "microseconds": call.max_us},
        "verdict": judge(call, 1e6 * timing.median, share),
    }
    print(row(call.name, result))
    return result


HEADER = (
    f"{'call':<38}{'us':>9} [{'p10':>8}, {'p90':>8}]{'MB':>8}{'GB/s':>7}{'% copy':>8}"
    f"{'% nec.':>8}{'copy us':>9}  floor"
)


def row(name: str, r: dict) -> str:
    us = [1e6 * r["timing"][key] for key in ("median", "p10", "p90")]
    floor = r["floor"]
    wanted = f">= {floor['share_of_copy']:.0%}" if floor["share_of_copy"] else ""
    wanted = f"<= {floor['microseconds']:.0f} us" if floor["microseconds"] else wanted
    late = "  (host-bound)" if r["host_share"] > 0.9 else ""
    return (
        f"{name:<38}{us[0]:>9.1f} [{us[1]:>8.1f}, {us[2]:>8.1f}]"
        f"{r['bytes_by_construction'] / 1e6:>8.1f}{r['bytes_per_second'] / 1e9:>7.0f}"
        f"{r['share_of_copy']:>8.1%}{r['share_of_copy_necessary']:>8.1%}"
        f"{1e6 * r['copy_of_same_bytes_seconds']:>9.1f}  {wanted} {r['verdict']}{late}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    parser.add_argument("--runs", type=int, default=50, help="counted runs of a call, >= 50")
    arguments = parser.parse_args()
    if arguments.runs < 50:
        parser.error(f"--runs must be at least 50, got {arguments.runs}")
    require_device("cuda")
    torch.manual_seed(0)
    copy_bandwidth = 2 * COPY_BYTES / copy_timing(2 * COPY_BYTES, arguments.runs).median
    gpu = torch.cuda.get_device_name()
    print(f"{gpu}: a copy of {COPY_BYTES / 2**30:.0f} GiB moves {copy_bandwidth / 1e9:.0f} GB/s")
    print(HEADER)
    results = [bench(call, copy_bandwidth, arguments.runs) for call in all_calls()]
    short = [r["op"] for r in results if r["verdict"] == "short"]
    print(f"{len(results)} calls timed, {len(short)} fall short of their floor")
    if arguments.json:
        about = {**environment(), "gpu": gpu, "cuda": torch.version.cuda}
        document = {"environment": about, "copy_bandwidth": copy_bandwidth, "results": results}
        arguments.json.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
