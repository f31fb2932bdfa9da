# SPDX-License-Identifier: Apache-2.0
"""Memory of training a UniPool model, by formula, and the tables of docs/choosing.md.

The formulas are those of one process that trains with AdamW on float32 weights, as `unipool train`
does, without gradient checkpointing; tests/bench/test_model_memory.py holds them against
what autograd saves. What kernels need while they run, and what an allocator wastes, is not in them.
"""

from dataclasses import dataclass

from unipool.models import UniPoolConfig, parameter_counts, preset
from unipool.report.tables import markdown

SCALES = ("182m", "469m", "650m", "830m", "978m")
GPU_BYTES = 80e9
WEIGHT, GRADIENT, MOMENTS = 4, 4, 8  # bytes per parameter: float32; AdamW keeps two moments


@dataclass(frozen=True)
class Precision:
    """Bytes that autograd saves per token, by what they are proportional to."""

    copy: int  # per parameter: the weights in the type of the products, held during a step
    width: int  # per layer and D: residuals, norms, inputs of the projections
    heads: int  # per layer and column of queries, attention's output, keys and values
    hidden: int  # per layer, expert of a token and F: the two pre-activations
    root: int  # per D: the final norm and the input of the head


PRECISIONS = {
    "fp32": Precision(copy=0, width=24, heads=4, hidden=8, root=12),
    "bf16": Precision(copy=2, width=28, heads=2, hidden=4, root=10),
}


def state_bytes(config: UniPoolConfig, precision: str) -> int:
    """Weights, gradients, optimizer, and a copy of all weights for autocast: at most so much."""
    per_parameter = WEIGHT + GRADIENT + MOMENTS + PRECISIONS[precision].copy
    return per_parameter * parameter_counts(config)["total"]


def activation_bytes(config: UniPoolConfig, precision: str) -> int:
    """What a token's forward pass leaves for the backward, for routers that score x itself."""
    p, c = PRECISIONS[precision], config
    columns = 2 * c.head_dim * (c.num_attention_heads + c.num_key_value_heads)
    attention = p.heads * columns + 4 * c.num_attention_heads
    experts = p.hidden * c.num_experts_per_tok * c.intermediate_size
    routing = 4 * c.num_experts + 16 * c.num_experts_per_tok  # logits; weight, id and plan
    layer = p.width * c.hidden_size + 8 + attention + experts + routing
    return c.num_hidden_layers * layer + p.root * c.hidden_size + 4 * c.vocab_size + 20


def size_table() -> str:
    rows = []
    for scale in SCALES:
        config, private = preset(scale), preset(scale, "vanilla")
        counts = parameter_counts(config)
        rows.append(
            [
                scale,
                f"{config.hidden_size}, {config.intermediate_size}, {config.num_hidden_layers}",
                str(config.num_experts),
                f"{config.num_hidden_layers} × {private.num_experts}",
                f"{counts['total'] / 1e9:.2f} B",
                f"{counts['expert'] / counts['total']:.0%}",
                f"{counts['active'] / 1e6:.0f} M",
                f"{parameter_counts(private)['total'] / 1e9:.2f} B",
            ]
        )
    head = ["scale", "D, F, L", "M, one pool", "layer-private", "parameters", "in experts"]
    return markdown([*head, "active", "layer-private parameters"], rows)


def memory_table() -> str:
    rows = []
    for scale in SCALES:
        config = preset(scale)
        row = [scale]
        for precision in PRECISIONS:
            state, token = state_bytes(config, precision), activation_bytes(config, precision)
            left = GPU_BYTES - state
            fits = f"{int(left / token):,}" if left > 0 else "–"
            row += [f"{state / 1e9:.0f} GB", f"{token / 1e6:.2f} MB", fits]
        rows.append(row)
    head = ["scale"]
    for precision in PRECISIONS:
        head += [f"{precision}: state", "per token", "tokens in 80 GB"]
    return markdown(head, rows)


def rows_table(pool_step: dict) -> str:
    """Rows per expert above which the products take longer than reading the weights."""
    rows = [
        ["H100 by datasheet", "bfloat16", "989 TFLOP/s", "3,350 GB/s", f"{989e12 / 3.35e12:.0f}"]
    ]
    for case in pool_step["results"]:
        if case["layers"] == 12:
            itemsize = {"float32": 4, "bfloat16": 2}[case["dtype"]]
            rate, bandwidth = case["matmul_flops"], case["read_bandwidth"]
            rows.append(
                [
                    "two cores of an AMD EPYC, measured",
                    case["dtype"],
                    f"{rate / 1e9:.0f} GFLOP/s",
                    f"{bandwidth / 1e9:.0f} GB/s",
                    f"{rate / bandwidth * itemsize / 2:.0f}",
                ]
            )
    return markdown(["machine", "dtype", "products", "reads", "rows per expert"], rows)


def choosing(pool_step: dict) -> dict[str, str]:
    """The tables of docs/choosing.md by the name of their mark."""
    return {"sizes": size_table(), "memory": memory_table(), "rows": rows_table(pool_step)}
