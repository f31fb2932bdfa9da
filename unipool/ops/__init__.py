# SPDX-License-Identifier: Apache-2.0
"""The ops: each is a torch.library op with a fake, under a torch.autograd.Function; a file per op.

Where a file has the name of its function, the attribute is the function: what else is in the file
comes with `from unipool.ops.expert_mlp import ...`.
"""

from unipool import _library  # noqa: F401  (registers the ops before anything looks for them)
from unipool.ops.dispatch import DispatchPlan, dispatch_plan, permute, unpermute
from unipool.ops.expert_mlp import expert_mlp
from unipool.ops.grouped_mm import grouped_mm
from unipool.ops.router import Routing, norm_topk, softmax_topk
from unipool.ops.router_logits import router_logits

__all__ = [
    "DispatchPlan",
    "Routing",
    "dispatch_plan",
    "expert_mlp",
    "grouped_mm",
    "norm_topk",
    "permute",
    "router_logits",
    "softmax_topk",
    "unpermute",
]
