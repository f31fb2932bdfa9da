# SPDX-License-Identifier: Apache-2.0
"""The shape and forms of the small models in tests, ids for them, and what they hold."""

from collections.abc import Sequence

import devices
import torch
from torch import Tensor

from unipool.models import UniPoolConfig, UniPoolForCausalLM

SHAPE = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 24,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    # Far from the default 0.01: at that scale all logits are alike and an error would not show.
    "initializer_range": 0.2,
    "balance_coefficient": 0.1,
}


NORM = {"router": "norm", "balance": "pool"}
VANILLA = {"router": "softmax", "num_pools": 4, "balance": "layer", "balance_delay": 0}
RECURRENT = {"router": "recurrent", "router_state_size": 12}
FORMS = {
    "norm": NORM,
    "vanilla": VANILLA,
    "grouped": {"num_pools": 2, "balance_delay": 0},
    "recurrent": RECURRENT | {"router_scoring": "norm"},
    "recurrent-vanilla": VANILLA | RECURRENT,
}


def make_model(**options) -> UniPoolForCausalLM:
    """Of SHAPE but for `options`; equal options mean equal weights, on whatever device."""
    torch.manual_seed(0)
    return UniPoolForCausalLM(UniPoolConfig(**(SHAPE | options))).to(devices.current())


def make_ids(*shape: int, seed: int = 1) -> Tensor:
    """0 is left to padding, which generation tells from the prompt by its id."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, SHAPE["vocab_size"], shape or (3, 11), generator=generator)
    return ids.to(devices.current())


def states(model: UniPoolForCausalLM) -> list[Tensor]:
    return [balancer.fraction.clone() for balancer in model.model.balancers]


def assert_all_equal(actual: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    assert len(actual) == len(expected) > 0
    for a, b in zip(actual, expected, strict=True):
        assert torch.equal(a, b)
