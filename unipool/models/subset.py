# SPDX-License-Identifier: Apache-2.0
"""Layers that see only some experts of their pool.

The router of such a layer has one row for each expert that it sees, in the order of
`UniPoolConfig.layer_experts`, and nothing for the others: they have no part in its norm or softmax
and cannot be chosen. It is exactly the router of a pool that consists of those experts, so its
calibration is c(V, k) of the V experts it sees. What follows here turns its ids into the pool's.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..ops import Routing


class ExpertSubset(nn.Module):
    """The experts of a pool that one layer sees: row i of its router stands for experts[i].

    Args:
        experts: V distinct ids in [0, M). num_experts: M of the pool.

    Attributes:
        ids: [V] int64 buffer, `experts`; not saved, for the configuration holds them.
    """

    ids: Tensor

    def __init__(self, experts: Sequence[int], num_experts: int) -> None:
        super().__init__()
        self.experts, self.num_experts = tuple(experts), num_experts
        self.register_buffer("ids", torch.tensor(self.experts), persistent=False)

    @torch.no_grad()
    def reset_ids(self) -> None:
        """Fill the buffer again, after the module was moved off the meta device."""
        self.ids.copy_(torch.tensor(self.experts))

    def forward(self, routing: Routing) -> Routing:
        """A Routing over the V experts of the layer -> the same over the M of the pool."""
        load = routing.load.new_zeros(self.num_experts)
        importance = routing.importance.new_zeros(self.num_experts)
        return Routing(
            routing.weights,
            self.ids[routing.experts].to(routing.experts.dtype),
            load.index_copy(0, self.ids, routing.load),
            importance.index_copy(0, self.ids, routing.importance),
        )

    def extra_repr(self) -> str:
        return f"experts={len(self.experts)} of {self.num_experts}"
