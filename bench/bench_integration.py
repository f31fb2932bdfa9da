# SPDX-License-Identifier: Apache-2.0
"""Hugging Face MoE blocks under experts_implementation="unipool" against transformers' own.

    python bench/bench_integration.py [--model mixtral qwen3_moe olmoe] [--widths small] ...
    python bench/bench_integration.py --device cuda --widths full --dtype bfloat16 --layers 2

A stack of a model's own MoE blocks (norm, router, experts, residual; no attention) with random
weights, the same in all ways. Two cases: a training step, forward and backward over many tokens,
and decoding, forward over a few. batched_mm copies the weights of every token's experts, so it is
in the second only, where transformers itself prefers it on GPUs. All ways are compared with eager
before anything is timed. The floor of a pass is max(FLOPs / matmul rate, bytes / bandwidth), rates
measured in turn with the ways; bytes: ops.costs, with the experts that the tokens can reach.
"""

import argparse
from collections.abc import Callable
from pathlib import Path

import torch
import transformers
from harness import Timing, as_result, interleave, require_close, require_device, write_json
from pool_step import Rates, rate_ways, rates_of
from torch import Tensor, nn
from torch.nn import functional as F
from workloads import Workload, named

import unipool.integrations.transformers as integration
from unipool.ops import costs

BOUNDS = {"float32": 1e-5, "bfloat16": 3e-2, "float16": 5e-3}
TRAIN = (integration.NAME, "eager", "grouped_mm")
DECODE = (*TRAIN, "batched_mm")


FAMILIES = ("mixtral", "qwen3_moe", "olmoe")
# full: Mixtral 8x7B, Qwen3-30B-A3B, OLMoE 1B-7B.
SHAPES = {
    widths: {family: named(f"{family} {widths}") for family in FAMILIES}
    for widths in ("small", "full", "tiny")
}
WIDTH_NAMES = {  # of F and M, which differ between the configurations
    "mixtral": ("intermediate_size", "num_local_experts"),
    "qwen3_moe": ("moe_intermediate_size", "num_experts"),
    "olmoe": ("intermediate_size", "num_experts"),
}


def make_model(
    name: str, shape: Workload, layers: int, dtype: torch.dtype, device: str
) -> nn.Module:
    d_ff_name, experts_name = WIDTH_NAMES[name]
    config = transformers.AutoConfig.for_model(
        name,
        hidden_size=shape.d_model,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_experts_per_tok=shape.top_k,
        vocab_size=64,
        pad_token_id=None,
        bos_token_id=None,
        eos_token_id=None,
        initializer_range=shape.d_model**-0.5,
        **{d_ff_name: shape.d_ff, experts_name: shape.experts},
    )
    with torch.device(device):
        return transformers.AutoModel.from_config(config, dtype=dtype)


class Blocks(nn.Module):
    """A model's MoE blocks. chained: each reads its predecessor's output, as in a model; otherwise
    all read the stack's input, so that a rounding difference cannot change a later routing."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.config = model.config
        found = [m for m in model.modules() if hasattr(m, "experts") and hasattr(m, "gate")]
        self.blocks = nn.ModuleList(found)
        self.chained = True

    def forward(self, x: Tensor) -> Tensor:
        y = x
        for block in self.blocks:
            h = F.layer_norm(y if self.chained else x, x.shape[-1:])
            y = y + block(h)
        return y


def make_ways(
    stack: Blocks, implementations: tuple[str, ...], run: Callable[[], object]
) -> dict[str, Callable[[], object]]:
    def way(implementation: str) -> object:
        stack.config._experts_implementation = implementation
        return run()

    return {name: lambda name=name: way(name) for name in implementations}


def check(what: str, stack: Blocks, ways: dict[str, Callable], bound: float) -> None:
    """The results of all ways, tensors by name, against those of eager."""
    stack.chained = False
    wanted = {name: t.clone() for name, t in ways["eager"]().items()}
    for way, run in ways.items():
        for name, got in run().items():
            require_close(f"{what}, {way}: {name}", got, wanted[name], bound)
    stack.chained = True


def training_ways(stack: Blocks, x: Tensor) -> dict[str, Callable[[], dict[str, Tensor]]]:
    x = x.clone().requires_grad_()
    grad = torch.randn_like(x)

    def run() -> dict[str, Tensor]:
        stack.zero_grad()
        x.grad = None
        stack(x).backward(grad)
        return {"x": x.grad} | {name: p.grad for name, p in stack.named_parameters()}

    return make_ways(stack, TRAIN, run)


def decoding_ways(stack: Blocks, x: Tensor) -> dict[str, Callable[[], dict[str, Tensor]]]:
    @torch.no_grad()
    def run() -> dict[str, Tensor]:
        return {"output": stack(x)}

    return make_ways(stack, DECODE, run)


def floor_seconds(
    shape: Workload, tokens: int, training: bool, itemsize: int, rates: Rates
) -> float:
    """Of one block, with both gradients in training. A few tokens reach a few experts only."""
    reached = min(shape.experts, tokens * shape.top_k)
    sizes = (tokens, shape.top_k, shape.d_model, shape.d_ff)
    passes = [costs.expert_mlp(*sizes, reached, itemsize, keep=training)]
    if training:
        passes.append(costs.expert_mlp_bwd(*sizes, reached, itemsize))
        passes.append(costs.expert_wgrad(*sizes, shape.experts, itemsize))
    return sum(cost.seconds(rates.matmul, rates.read) for cost in passes)


def report(case: dict, timings: list[Timing], floor: float) -> dict:
    ours = timings[0]
    print("\n" + "  ".join(f"{key}={value}" for key, value in case.items()))
    for t in timings:
        print(f"  {t}  {t.median / ours.median:6.2f}x ours  {t.median / floor:6.2f}x floor")
    ratios = {t.name: t.median / ours.median for t in timings}
    return as_result(case, timings, ratio_to_ours=ratios, floor=floor)


def bench(name: str, dtype_name: str, arguments: argparse.Namespace) -> list[dict]:
    device, dtype = arguments.device, getattr(torch, dtype_name)
    shape = SHAPES[arguments.widths][name]
    torch.manual_seed(0)
    stack = Blocks(make_model(name, shape, arguments.layers, dtype, device))
    cases = [("training step", arguments.tokens, training_ways, arguments.runs)]
    cases += [("decoding", t, decoding_ways, 3 * arguments.runs) for t in arguments.decode_tokens]
    results = []
    for what, tokens, make, runs in cases:
        stack.zero_grad()
        x = torch.randn(1, tokens, shape.d_model, device=device).to(dtype)
        ways = make(stack, x)
        check(f"{name} {what} {dtype_name}", stack, ways, BOUNDS[dtype_name])
        bounds = rate_ways(dtype, device)
        timings = interleave(ways | bounds, warmup=1, runs=runs, device=device)
        training = what == "training step"
        rates = rates_of(timings, device)
        floor = arguments.layers * floor_seconds(shape, tokens, training, dtype.itemsize, rates)
        timings = [t for t in timings if t.name in ways]
        case = {"case": f"{name} {what}", "dtype": dtype_name, "T": tokens}
        case |= {n: getattr(shape, n) for n in ("d_model", "d_ff", "experts", "top_k")}
        case |= {"layers": arguments.layers, "transformers": transformers.__version__}
        case["device"] = torch.cuda.get_device_name() if device == "cuda" else "cpu"
        results.append(report(case, timings, floor))
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", nargs="+", default=list(WIDTH_NAMES), choices=WIDTH_NAMES)
    parser.add_argument("--widths", default="small", choices=SHAPES)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=2048, help="of the training step")
    parser.add_argument("--decode-tokens", type=int, nargs="*", default=[1, 8])
    parser.add_argument("--dtype", nargs="+", default=["float32", "bfloat16"], choices=BOUNDS)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--runs", type=int, default=7, help="counted runs of each way")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    arguments = parser.parse_args()
    require_device(arguments.device)
    results = []
    for name in arguments.model:
        for dtype_name in arguments.dtype:
            results += bench(name, dtype_name, arguments)
            if arguments.json:
                write_json(arguments.json, results)
    print(f"\n{len(results)} cases timed")


if __name__ == "__main__":
    main()
