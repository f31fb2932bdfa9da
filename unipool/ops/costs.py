# SPDX-License-Identifier: Apache-2.0
"""What each op has to compute and to move: FLOPs, and bytes to and from memory.

A product of [a, b] and [b, c] is 2abc FLOPs; nothing else counts as one. Bytes are the least that
any implementation moves: each operand once, each result once, weights only of experts that have
rows, and what a later pass reads (the pre-activations) or one op hands to the next (the activations
of the expert MLP, and its k rows per token where k > 1). What a kernel moves beyond that, because
nothing it needs twice stays in a cache, is the kernel's own affair.

T tokens, M experts, k experts per token, N = T k rows, D model width, F expert width. `size` is the
bytes of an element of rows and weights; logits are float32, as are the router's weights.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Cost:
    flops: float
    bytes: float

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(self.flops + other.flops, self.bytes + other.bytes)

    def __mul__(self, times: int) -> "Cost":
        return Cost(times * self.flops, times * self.bytes)

    __rmul__ = __mul__

    def seconds(self, flops_per_second: float, bytes_per_second: float) -> float:
        """The floor: arithmetic and traffic at the same time, each at its full rate."""
        return max(self.flops / flops_per_second, self.bytes / bytes_per_second)

    def bound(self, flops_per_second: float, bytes_per_second: float) -> str:
        """Which of the two it is."""
        by_flops = self.flops / flops_per_second >= self.bytes / bytes_per_second
        return "flops" if by_flops else "bytes"


# --- routers


def router_logits(tokens: int, d_model: int, experts: int, size: int) -> Cost:
    operands = size * (tokens * d_model + experts * d_model)
    return Cost(2.0 * tokens * d_model * experts, operands + 4 * tokens * experts)


def router_logits_bwd(tokens: int, d_model: int, experts: int, size: int) -> Cost:
    """Both gradients."""
    rows, weights = size * tokens * d_model, size * experts * d_model
    return Cost(4.0 * tokens * d_model * experts, 2 * (rows + weights) + 4 * tokens * experts)


def topk(tokens: int, experts: int, top_k: int) -> Cost:
    """norm_topk and softmax_topk: logits in; weights and ids of the slots, load, importance out."""
    return Cost(0.0, 4 * tokens * experts + 8 * tokens * top_k + 8 * experts)


def topk_bwd(tokens: int, experts: int, top_k: int) -> Cost:
    """Logits, ids and both gradients in; the gradient of the logits out."""
    return Cost(0.0, 8 * tokens * experts + 8 * tokens * top_k + 4 * experts)


# --- dispatch


def dispatch_plan(slots: int, experts: int) -> Cost:
    """Ids in; order, inverse and offsets out. slots: of all layers."""
    return Cost(0.0, 12 * slots + 4 * (experts + 1))


def permute(tokens: int, top_k: int, d_model: int, size: int) -> Cost:
    """Tokens and order in, rows out."""
    slots = tokens * top_k
    return Cost(0.0, size * (tokens + slots) * d_model + 4 * slots)


def unpermute(tokens: int, top_k: int, d_model: int, size: int) -> Cost:
    """Rows, inverse and weights in, tokens out."""
    slots = tokens * top_k
    return Cost(0.0, size * (slots + tokens) * d_model + 8 * slots)


def unpermute_bwd(tokens: int, top_k: int, d_model: int, size: int) -> Cost:
    """Tokens' gradient, rows, order, inverse, weights in; gradients of rows and weights out."""
    slots = tokens * top_k
    return Cost(0.0, size * (tokens + 2 * slots) * d_model + 16 * slots)


# --- products


def grouped_mm(rows: int, n: int, k: int, used: int, size: int) -> Cost:
    """[rows, k] times the [n, k] of each row's expert, `used` of which have rows. The gradient of
    the rows, grouped_mm_bwd_a, costs the same."""
    return Cost(2.0 * rows * n * k, size * (rows * k + rows * n + used * n * k))


def grouped_wgrad(
    grad_rows: int, input_rows: int, rows: int, n: int, k: int, experts: int, size: int, out: int
) -> Cost:
    """[experts, n, k], summed over `rows` rows; `grad_rows` and `input_rows` of the two operands
    are read, fewer where k slots share a token's row. `out`: bytes per element of the result and
    per time that it is moved, so 4 + 4 where it is added to in float32."""
    operands = size * (grad_rows * n + input_rows * k)
    return Cost(2.0 * rows * n * k, operands + out * experts * n * k)


# --- the expert MLP


def expert_mlp(
    tokens: int, top_k: int, d_model: int, d_ff: int, used: int, size: int, keep: bool = True
) -> Cost:
    """Forward of a layer; `used` experts have rows; `keep`: pre-activations are stored."""
    T, N, D, F = tokens, tokens * top_k, d_model, d_ff
    weights, rows = 3 * D * F * used, 2 * T * D
    hidden = (4 if keep else 2) * N * F  # written and read; pre-activations written
    return Cost(6.0 * N * D * F, size * (weights + rows + hidden + _summed(N, D, top_k)))


def expert_mlp_bwd(tokens: int, top_k: int, d_model: int, d_ff: int, used: int, size: int) -> Cost:
    """Gradients of tokens, pre-activations and router weights. Of widths F per row: pre-activations
    2 in, their gradient 2 out and 2 in again, activations for the weight gradient 1 out."""
    T, N, D, F = tokens, tokens * top_k, d_model, d_ff
    weights, rows = 3 * D * F * used, 2 * T * D
    return Cost(6.0 * N * D * F, size * (weights + rows + 7 * N * F + _summed(N, D, top_k)))


def expert_wgrad(
    tokens: int,
    top_k: int,
    d_model: int,
    d_ff: int,
    experts: int,
    size: int,
    layers: int = 1,
    out: int | None = None,
) -> Cost:
    """Both weight gradients of a pool over `layers` layers; every expert's is written."""
    T, N, D, F = tokens, tokens * top_k, d_model, d_ff
    moved = size if out is None else out
    sizes = {"rows": layers * N, "experts": experts, "size": size, "out": moved}
    return grouped_wgrad(layers * N, layers * T, n=2 * F, k=D, **sizes) + grouped_wgrad(
        layers * T, layers * N, n=D, k=F, **sizes
    )


def _summed(rows: int, d_model: int, top_k: int) -> int:
    """Elements of rows that are stored for their sum: none where a token has one."""
    return 2 * rows * d_model if top_k > 1 else 0
