# SPDX-License-Identifier: Apache-2.0
"""The experts of one layer: a fused SwiGLU of each expert, weighted and summed for each token."""

import torch
from torch import Tensor

from unipool.ops.arguments import autocast, check_devices, check_tensors
from unipool.ops.dispatch import dispatch_plan
from unipool.ops.first_order import first_order
from unipool.ops.grouped_wgrad import WeightGradCollector, WeightGradSegment
from unipool.ops.router import Routing

_ops = torch.ops.unipool


# --- fakes


@torch.library.register_fake("unipool::expert_mlp")
def _(x, weights, gate_up, down, order, inverse, offsets, keep_preact):
    plan = {"order": order, "inverse": inverse, "offsets": offsets}
    check_devices("expert_mlp", x=x, weights=weights, gate_up=gate_up, down=down, **plan)
    rows = order.shape[0] if keep_preact else 0
    return x.new_empty(x.shape), x.new_empty((rows, gate_up.shape[1]))


@torch.library.register_fake("unipool::expert_mlp_bwd")
def _(grad, weights, gate_up, down, order, inverse, offsets, preact):
    plan = {"order": order, "inverse": inverse, "offsets": offsets, "preact": preact}
    check_devices("expert_mlp_bwd", grad=grad, weights=weights, gate_up=gate_up, down=down, **plan)
    return (
        grad.new_empty(grad.shape),
        weights.new_empty(weights.shape),
        preact.new_empty(preact.shape),
        preact.new_empty((preact.shape[0], down.shape[2])),
    )


@torch.library.register_fake("unipool::expert_mlp_bwd_")
def _(grad, weights, gate_up, down, order, inverse, offsets, preact):
    plan = {"order": order, "inverse": inverse, "offsets": offsets, "preact": preact}
    check_devices("expert_mlp_bwd_", grad=grad, weights=weights, gate_up=gate_up, down=down, **plan)
    return (
        grad.new_empty(grad.shape),
        weights.new_empty(weights.shape),
        preact.new_empty((preact.shape[0], down.shape[2])),
    )


# --- autograd


def _saves_as_is() -> bool:
    """Whether what an autograd function saves now is kept by it alone. Hooks on saved tensors may
    keep it too; a compiler plans the memory itself."""
    if torch.compiler.is_compiling():
        return False
    hooks = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)
    return hooks is not None and hooks(True) is None


def _frees_saved_tensors() -> bool:
    """Whether the backward that is running frees what its nodes saved (no retain_graph)."""
    keeps_graph = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", lambda: True)
    return not keeps_graph()


class ExpertMLP(torch.autograd.Function):
    """With a collector (nn/pool_pass.py) the weight gradients' operands are left there.

    Backward writes the gradient of the pre-activations over them where nobody can need them again.
    """

    @staticmethod
    def forward(ctx, x, weights, gate_up, down, order, inverse, offsets, collector):
        ctx.set_materialize_grads(False)
        ctx.collector = collector
        ctx.owns_preact = _saves_as_is()
        y, preact = _ops.expert_mlp(x, weights, gate_up, down, order, inverse, offsets, True)
        ctx.save_for_backward(x, weights, gate_up, down, order, inverse, offsets, preact)
        return y

    @staticmethod
    @first_order
    def backward(ctx, grad):
        x, weights, gate_up, down, order, inverse, offsets, preact = ctx.saved_tensors
        if grad is None:
            return (None,) * 8
        arguments = (grad, weights, gate_up, down, order, inverse, offsets, preact)
        if ctx.owns_preact and _frees_saved_tensors():
            grad_x, grad_weights, hidden = _ops.expert_mlp_bwd_(*arguments)
            grad_preact = preact
        else:
            grad_x, grad_weights, grad_preact, hidden = _ops.expert_mlp_bwd(*arguments)
        top_k = inverse.shape[1]
        grad_gate_up = grad_down = None
        if ctx.collector is not None:
            needs = ctx.needs_input_grad[2:4]
            # Not when only gradients of other tensors were asked for.
            entry = ctx.next_functions[2 if needs[0] else 3][0]
            if torch._C._will_engine_execute_node(entry):
                segment = WeightGradSegment(grad, x, grad_preact, hidden, order, offsets)
                origins = (grad, x, weights, gate_up, down) if ctx.create_graph else ()
                ctx.collector.add(segment, top_k, needs, origins)
            return grad_x, grad_weights, None, None, None, None, None, None
        if ctx.needs_input_grad[2]:
            grad_gate_up = _ops.grouped_wgrad([grad_preact], [x], [order], [offsets], 0, top_k)
        if ctx.needs_input_grad[3]:
            grad_down = _ops.grouped_wgrad([grad], [hidden], [order], [offsets], top_k, 0)
        return grad_x, grad_weights, grad_gate_up, grad_down, None, None, None, None


# --- public


def expert_mlp(x: Tensor, routing: Routing, gate_up: Tensor, down: Tensor) -> Tensor:
    """Weighted sum of SwiGLU experts, fused: sum_j w_j down_e (silu(gate_e x) * up_e x), e = e_j.

    Args:
        x: [T, D] tokens.
        routing: of the T tokens, weights [T, k] and experts [T, k]; ids outside [0, M) add nothing.
        gate_up: [M, 2F, D], gate rows first, in the dtype of x.
        down: [M, D, F], in the dtype of x.

    Returns:
        [T, D] in the dtype of x. Saved for backward: x and the pre-activations [T * k, 2F].

    Raises:
        ValueError, TypeError: shapes, dtypes or devices do not fit.
    """
    return pooled_expert_mlp(x, routing, gate_up, down, None)


def pooled_expert_mlp(
    x: Tensor,
    routing: Routing,
    gate_up: Tensor,
    down: Tensor,
    collector: WeightGradCollector | None,
) -> Tensor:
    """expert_mlp whose backward leaves the weight gradients' operands with a collector, if any."""
    if not isinstance(routing, tuple) or len(routing) != 4:
        raise TypeError(f"expert_mlp: routing must be a Routing, got {type(routing).__name__}")
    weights, experts = routing[:2]
    check_tensors(
        "expert_mlp",
        x=x,
        gate_up=gate_up,
        down=down,
        **{"routing.weights": weights, "routing.experts": experts},
    )
    if gate_up.dim() != 3 or gate_up.shape[0] < 1:
        raise ValueError(
            f"expert_mlp: gate_up must be [M, 2F, D] with M >= 1, got {list(gate_up.shape)}"
        )
    if experts.dim() != 2 or experts.shape[1] < 1:
        raise ValueError(
            f"expert_mlp: routing.experts must be [T, k] with k >= 1, got {list(experts.shape)}"
        )
    if experts.dtype != torch.int32:
        raise TypeError(f"expert_mlp: routing.experts must be int32, got {experts.dtype}")
    x, gate_up, down = autocast(x, gate_up, down)
    plan = dispatch_plan(experts, gate_up.shape[0])
    inputs = (x, weights, gate_up, down)
    if torch.is_grad_enabled() and any(t.requires_grad for t in inputs):
        return ExpertMLP.apply(*inputs, *plan, collector)
    return _ops.expert_mlp(*inputs, *plan, False)[0]
