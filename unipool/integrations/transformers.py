# SPDX-License-Identifier: Apache-2.0
"""Mixture-of-Experts models of Hugging Face on the fused ops: experts_implementation="unipool".

Importing this module registers the name with transformers. Every model whose experts have the
layout of unipool.ops.expert_mlp then takes it (Mixtral, Qwen-MoE, OLMoE, DeepSeek and others):

    import unipool.integrations.transformers

    model = AutoModelForCausalLM.from_pretrained(path, experts_implementation="unipool")
    model.set_experts_implementation("unipool")  # or switch a model that is there

The routing is that of the model's own router, the weights are the model's own parameters.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from unipool.ops import Routing, expert_mlp
from unipool.ops.arguments import acc_dtype

try:
    from transformers.activations import ACT2FN
    from transformers.integrations.moe import ExpertsInterface
except ImportError as error:
    raise ImportError(
        'unipool.integrations.transformers needs transformers >= 5.17: pip install "unipool[train]"'
    ) from error

__all__ = ["experts_forward", "unsupported"]

NAME = "unipool"
_SILU = (nn.SiLU, type(ACT2FN["silu"]))
# What transformers' decorator of experts classes says of a class, and what it must say here.
_LAYOUT = (
    ("has_gate", True, "no gate"),
    ("has_bias", False, "biases"),
    ("is_transposed", False, "transposed weights"),
    ("is_concatenated", True, "interleaved gate and up rows"),
    ("has_post_expert_norm", False, "a norm after each expert"),
)


def unsupported(experts: nn.Module) -> list[str]:
    """Why a module of experts cannot run on expert_mlp, one phrase a reason; empty if it can."""
    reasons = [says for name, due, says in _LAYOUT if getattr(experts, name, due) != due]
    activation = getattr(experts, "act_fn", None)
    if type(experts)._apply_gate.__module__ != ExpertsInterface.__module__:
        reasons.append("a gating of its own")
    elif not isinstance(activation, _SILU) and activation is not F.silu:
        name = getattr(activation, "__name__", type(activation).__name__)
        reasons.append(f"the activation {name} instead of SiLU")
    weight = getattr(experts, "gate_up_proj", None)
    if weight is not None and weight.dtype.itemsize < 2:
        reasons.append(f"weights of {weight.dtype}")
    return reasons


def experts_forward(
    self: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """The forward of a transformers experts module, on expert_mlp.

    Args:
        self: has gate_up_proj [M, 2F, D], gate rows first, and down_proj [M, D, F]; SiLU, no bias.
        hidden_states: [T, D].
        top_k_index: [T, k] expert ids of any integer type. Ids outside [0, M), as expert
            parallelism has them for the experts of other ranks, add nothing.
        top_k_weights: [T, k].

    Returns:
        [T, D] in the dtype of hidden_states. As under grouped_mm, products are in the dtype of the
        weights or, where autocast is on, in that of autocast.

    Raises:
        ValueError: the experts have another layout.
    """
    if reasons := unsupported(self):
        raise ValueError(
            f'experts_implementation="{NAME}": {type(self).__name__} must be SwiGLU experts in the '
            f"layout of unipool.ops.expert_mlp, got {', '.join(reasons)}; choose another one, such "
            'as "grouped_mm"'
        )
    x, gate_up = hidden_states, self.gate_up_proj
    if x.dtype != gate_up.dtype and not torch.is_autocast_enabled(x.device.type):
        x = x.to(gate_up.dtype)
    # expert_mlp reads neither load nor importance, which are the router's own business.
    weights = top_k_weights.to(acc_dtype(x.dtype))
    routing = Routing(weights, top_k_index.to(torch.int32), None, None)
    return expert_mlp(x, routing, gate_up, self.down_proj).to(hidden_states.dtype)


ExpertsInterface.register(NAME, experts_forward)
