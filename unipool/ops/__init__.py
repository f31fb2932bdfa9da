# SPDX-License-Identifier: Apache-2.0
"""The ops: each is a torch.library op with a fake, under a torch.autograd.Function."""

from unipool import _library  # noqa: F401  (registers the ops before anything looks for them)
from unipool.ops.dispatch import DispatchPlan, dispatch_plan, permute, unpermute
from unipool.ops.experts import expert_mlp, grouped_mm
from unipool.ops.router import Routing, norm_topk, router_logits, softmax_topk

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
