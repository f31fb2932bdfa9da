# SPDX-License-Identifier: Apache-2.0
"""Level L0: the router and dispatch kernels on a GPU, beside a copy of as many bytes.

    python bench/bench_kernels.py [--json FILE] [--runs N] [--rehearse]

CUDA events around one call, L2 flushed before each by reading 256 MB, medians [p10, p90], each
call in turn with a copy of its bytes. Bytes by construction are what the kernels move to and from
DRAM if nothing but the reuse named in docs/cuda-kernels.md hits a cache; GB/s and the share of the
copy refer to them. Necessary bytes are those that any implementation has to move: over the
bandwidth of a large copy, measured here, they are the floor. Every op is compared with the CPU, at
fewer tokens, before anything is timed. --rehearse takes few tokens and runs, to show that the
program works.
"""

import argparse
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from harness import interleave_on_gpu, require_close, require_device, write_json
from torch import Tensor

from unipool.ops import costs

TOKENS, WIDTH, CHECK_TOKENS = 65536, 1024, 512
WARM_UPS, COPY_BYTES = 10, 2**30
ROUTER_BLOCKS = 3 * 132  # of the float32 layouts up to M = 384: three per multiprocessor
PLAN_SPAN, PLAN_BLOCKS = 512, 4 * 132  # least slots of a block, most blocks
BOUNDS = {torch.float32: 1e-5, torch.bfloat16: 1e-2}
CALIBRATION, EPS = 3.0, 1e-8


@dataclass(frozen=True)
class Traffic:
    """Bytes of one call, to and from DRAM."""

    necessary: int
    moved: int


# --- bytes; logits float32, rows bfloat16. Necessary: ops.costs. Moved: by docs/cuda-kernels.md.


def topk_bytes(tokens: int, experts: int, top_k: int) -> Traffic:
    """Moved: partial sums too."""
    necessary = int(costs.topk(tokens, experts, top_k).bytes)
    return Traffic(necessary, necessary + 2 * 8 * ROUTER_BLOCKS * experts)


def topk_bwd_bytes(tokens: int, experts: int, top_k: int) -> Traffic:
    necessary = int(costs.topk_bwd(tokens, experts, top_k).bytes)
    return Traffic(necessary, necessary)


def plan_bytes(slots: int, experts: int) -> Traffic:
    """Moved: ids twice, and the blocks' counts written twice and read twice from DRAM."""
    blocks = min(max(-(-slots // PLAN_SPAN), 1), PLAN_BLOCKS)
    necessary = int(costs.dispatch_plan(slots, experts).bytes)
    return Traffic(necessary, necessary + 4 * slots + 4 * 4 * blocks * experts)


def permute_bytes(tokens: int, top_k: int, width: int) -> Traffic:
    """Moved: a token's row is read once for each of its copies."""
    necessary = int(costs.permute(tokens, top_k, width, 2).bytes)
    return Traffic(necessary, necessary + 2 * tokens * (top_k - 1) * width)


def unpermute_bytes(tokens: int, top_k: int, width: int) -> Traffic:
    necessary = int(costs.unpermute(tokens, top_k, width, 2).bytes)
    return Traffic(necessary, necessary)


def unpermute_bwd_bytes(tokens: int, top_k: int, width: int) -> Traffic:
    necessary = int(costs.unpermute_bwd(tokens, top_k, width, 2).bytes)
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


def router_calls(experts: int, top_k: int, tokens: int = TOKENS) -> list[Call]:
    shape = {"T": tokens, "M": experts, "k": top_k}
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


def plan_call(experts: int, layers: int, tokens: int = TOKENS) -> Call:
    def arguments(tokens: int) -> Arguments:
        return [[_ids(tokens, experts, 1) for _ in range(layers)], experts]

    shape = {"T": tokens, "M": experts, "k": 1, "layers": layers}
    traffic = plan_bytes(tokens * layers, experts)
    return Call("dispatch_plan", shape, traffic, arguments, max_us=30.0 if layers == 1 else None)


def row_calls(top_k: int, experts: int = 96, tokens: int = TOKENS) -> list[Call]:
    def permute(tokens: int) -> Arguments:
        return [_rows(tokens, WIDTH), _plan(tokens, experts, top_k)[0], top_k]

    def unpermute(tokens: int) -> Arguments:
        inverse = _plan(tokens, experts, top_k)[1]
        return [_rows(tokens * top_k, WIDTH), inverse, torch.rand(tokens, top_k)]

    def unpermute_bwd(tokens: int) -> Arguments:
        order, inverse, _ = _plan(tokens, experts, top_k)
        rows = _rows(tokens, WIDTH), _rows(tokens * top_k, WIDTH)
        return [*rows, order, inverse, torch.rand(tokens, top_k)]

    shape = {"T": tokens, "k": top_k, "D": WIDTH}
    sizes = tuple(shape.values())
    return [
        Call("permute", shape, permute_bytes(*sizes), permute, min_share=0.85),
        Call("unpermute", shape, unpermute_bytes(*sizes), unpermute, min_share=0.85),
        Call("unpermute_bwd", shape, unpermute_bwd_bytes(*sizes), unpermute_bwd),
    ]


def all_calls(tokens: int = TOKENS) -> list[Call]:
    calls = router_calls(384, 1, tokens) + router_calls(96, 8, tokens)
    calls += [plan_call(experts, layers, tokens) for experts in (96, 384) for layers in (1, 12)]
    return calls + row_calls(1, tokens=tokens) + row_calls(8, tokens=tokens)


# --- check and timing


def run_call(call: Call, arguments: Arguments) -> list[Tensor]:
    results = getattr(torch.ops.unipool, call.op)(*arguments)
    return [results] if isinstance(results, Tensor) else list(results)


def _to_cuda(value: object) -> object:
    if isinstance(value, list):
        return [_to_cuda(v) for v in value]
    return value.cuda() if isinstance(value, Tensor) else value


def check(call: Call, tokens: int) -> None:
    """The op on the GPU against the CPU."""
    arguments = call.arguments(tokens)
    for i, (got, want) in enumerate(
        zip(run_call(call, _to_cuda(arguments)), run_call(call, arguments), strict=True)
    ):
        what = f"{call.name}: result {i}"
        if want.is_floating_point():
            require_close(what, got.cpu(), want, BOUNDS[want.dtype])
        elif not torch.equal(got.cpu(), want):
            raise RuntimeError(f"{what}: integers differ from the CPU's, not timed")


def copy_of(total_bytes: int) -> Callable[[], object]:
    """A copy that reads and writes total_bytes together."""
    source = torch.zeros(max(total_bytes // 2, 1), dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return lambda: target.copy_(source)


def copy_bandwidth_of(total_bytes: int, runs: int) -> float:
    ways = {"copy": copy_of(total_bytes)}
    (timing,), _ = interleave_on_gpu(ways, warmup=WARM_UPS, runs=runs)
    return total_bytes / timing.median


def judge(call: Call, microseconds: float, share: float) -> str:
    """pass, short, or - where no floor is set."""
    if call.min_share is not None:
        return "pass" if share >= call.min_share else "short"
    if call.max_us is not None:
        return "pass" if microseconds <= call.max_us else "short"
    return "-"


def bench(call: Call, copy_bandwidth: float, runs: int) -> dict:
    tokens = call.shape["T"]
    check(call, min(tokens, CHECK_TOKENS))
    with torch.device("cuda"):
        arguments = call.arguments(tokens)
    ways = {call.name: lambda: run_call(call, arguments), "copy": copy_of(call.traffic.moved)}
    (timing, copy), host_share = interleave_on_gpu(ways, warmup=WARM_UPS, runs=runs)
    share = copy.median / timing.median
    result = {
        "op": call.op,
        **call.shape,
        "bytes_by_construction": call.traffic.moved,
        "bytes_necessary": call.traffic.necessary,
        "timing": asdict(timing),
        "floor_seconds": call.traffic.necessary / copy_bandwidth,
        "bytes_per_second": call.traffic.moved / timing.median,
        "copy_of_same_bytes": asdict(copy),
        "share_of_copy": share,
        "host_share": host_share,
        "wanted": {"share_of_copy": call.min_share, "microseconds": call.max_us},
        "verdict": judge(call, 1e6 * timing.median, share),
    }
    print(row(call.name, result))
    return result


HEADER = (
    f"{'call':<38}{'us':>9} [{'p10':>8}, {'p90':>8}]{'floor':>9}{'x floor':>8}{'MB':>8}{'GB/s':>7}"
    f"{'copy us':>9}{'% copy':>8}  wanted"
)


def row(name: str, r: dict) -> str:
    us = [1e6 * r["timing"][key] for key in ("median", "p10", "p90")]
    floor, wanted = 1e6 * r["floor_seconds"], r["wanted"]
    goal = f">= {wanted['share_of_copy']:.0%}" if wanted["share_of_copy"] else ""
    goal = f"<= {wanted['microseconds']:.0f} us" if wanted["microseconds"] else goal
    late = "  (host-bound)" if r["host_share"] > 0.9 else ""
    return (
        f"{name:<38}{us[0]:>9.1f} [{us[1]:>8.1f}, {us[2]:>8.1f}]{floor:>9.1f}{us[0] / floor:>8.2f}"
        f"{r['bytes_by_construction'] / 1e6:>8.1f}{r['bytes_per_second'] / 1e9:>7.0f}"
        f"{1e6 * r['copy_of_same_bytes']['median']:>9.1f}{r['share_of_copy']:>8.1%}"
        f"  {goal} {r['verdict']}{late}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    parser.add_argument("--runs", type=int, default=50, help="counted runs of a call, >= 50")
    parser.add_argument("--rehearse", action="store_true", help="few tokens, two runs")
    arguments = parser.parse_args()
    if arguments.runs < 50:
        parser.error(f"--runs must be at least 50, got {arguments.runs}")
    require_device("cuda")
    torch.manual_seed(0)
    tokens, runs, large = TOKENS, arguments.runs, 2 * COPY_BYTES
    if arguments.rehearse:
        tokens, runs, large = 64, 2, 2**16
    copy_bandwidth = copy_bandwidth_of(large, runs)
    print(
        f"{torch.cuda.get_device_name()}: a copy of {large / 2**31:.2f} GiB moves "
        f"{copy_bandwidth / 1e9:.0f} GB/s"
    )
    print(HEADER)
    results: list[dict] = []
    for call in all_calls(tokens):
        results.append(bench(call, copy_bandwidth, runs))
        if arguments.json:
            write_json(arguments.json, results, copy_bandwidth=copy_bandwidth)
    short = [r["op"] for r in results if r["verdict"] == "short"]
    print(f"{len(results)} calls timed, {len(short)} fall short of what is wanted")


if __name__ == "__main__":
    main()
