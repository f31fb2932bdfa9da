# SPDX-License-Identifier: Apache-2.0
"""Routers: a token's hidden state -> the experts of the pool that serve it."""

from functools import cache

import numpy as np
import torch
from torch import Tensor, nn

from unipool.ops import Routing, norm_topk, router_logits, softmax_topk

MAX_TOP_K = 16
_DRAWS = 16384  # each counts twice, as g and as -g; standard error below 0.1 %


@cache
def norm_router_calibration(num_experts: int, top_k: int) -> float:
    """The constant c(M, k) that lets the k weights of a NormRouter start with unit L2 norm.

    c = E[1 / |top-k(relu(g / |g|))|_2] for g ~ N(0, I_M) with at least one positive coordinate
    (UniPool, arXiv:2605.06665). For small M that mean still diverges, through draws whose only
    positive coordinates are near zero; norms below 1 / sqrt(M), the RMS coordinate, therefore
    count as 1 / sqrt(M), which does not happen in practice for M >= 64 and bounds c by sqrt(M).

    Drawn from numpy's frozen RandomState stream: the same value in every process.
    """
    random = np.random.RandomState(0)
    total, count = 0.0, 0
    rows = max(1, 2**21 // num_experts)
    for start in range(0, _DRAWS, rows):
        unit = random.standard_normal((min(rows, _DRAWS - start), num_experts))
        unit /= np.linalg.norm(unit, axis=1, keepdims=True)
        for signed in (unit, -unit):
            top = np.maximum(np.partition(signed, num_experts - top_k, axis=1)[:, -top_k:], 0)
            norm = np.linalg.norm(top, axis=1)
            norm = norm[norm > 0]
            total += float(np.sum(1 / np.maximum(norm, num_experts**-0.5)))
            count += norm.size
    return total / count


def check_sizes(name: str, d_model: int, num_experts: int, top_k: int) -> None:
    if d_model < 1:
        raise ValueError(f"{name}: d_model must be at least 1, got {d_model}")
    if num_experts < 1:
        raise ValueError(f"{name}: num_experts must be at least 1, got {num_experts}")
    limit = min(num_experts, MAX_TOP_K)
    if not 1 <= top_k <= limit:
        raise ValueError(
            f"{name}: top_k must be in [1, min(M={num_experts}, {MAX_TOP_K})], got {top_k}"
        )


def wide_logits(x: Tensor, weight: Tensor) -> Tensor:
    """ops.router_logits of x [T, D] and weight [M, D] of any two dtypes: float32, or float64."""
    # The op takes one dtype, and no float16 on the CPU.
    if x.dtype != weight.dtype or (x.dtype == torch.float16 and x.device.type == "cpu"):
        acc = torch.float64 if x.dtype == torch.float64 else torch.float32
        x, weight = x.to(acc), weight.to(acc)
    return router_logits(x, weight)


def new_scale(router: nn.Module, device=None) -> nn.Parameter:
    """sigma of NormRouter scores, [1] float32, for `router` to keep as its `scale`.

    One dimension, since FSDP2 shards no parameter without; what was saved with shape () loads, too.
    """
    router.register_load_state_dict_pre_hook(_give_scale_its_dimension)
    return nn.Parameter(torch.empty(1, device=device, dtype=torch.float32))


def _give_scale_its_dimension(_router, state: dict[str, Tensor], prefix: str, *_) -> None:
    name = f"{prefix}scale"
    if name in state and state[name].dim() == 0:
        state[name] = state[name].reshape(1)


def norm_routing(router: nn.Module, logits: Tensor, mask: Tensor | None) -> Routing:
    """ops.norm_topk with the scale, k, calibration and eps of `router`."""
    return norm_topk(
        logits,
        router.scale.to(logits.dtype),
        router.top_k,
        calibration=router.calibration,
        eps=router.eps,
        mask=mask,
    )


class _Router(nn.Module):
    """The part that routers share: the projection [M, D] and its initialisation."""

    def __init__(self, d_model: int, num_experts: int, top_k: int, device=None, dtype=None) -> None:
        check_sizes(type(self).__name__, d_model, num_experts, top_k)
        super().__init__()
        self.d_model, self.num_experts, self.top_k = d_model, num_experts, top_k
        self.weight = nn.Parameter(torch.empty(num_experts, d_model, device=device, dtype=dtype))

    def reset_parameters(self, std: float | None = None) -> None:
        """Normal weights; std defaults to 1 / sqrt(D): unit inputs give logits of order 1."""
        nn.init.normal_(self.weight, std=self.d_model**-0.5 if std is None else std)

    def logits(self, x: Tensor) -> Tensor:
        if x.dim() != 2 or x.shape[1] != self.d_model:
            raise ValueError(
                f"{type(self).__name__}: x must be [T, {self.d_model}], got {list(x.shape)}"
            )
        return wide_logits(x, self.weight)

    def extra_repr(self) -> str:
        return f"d_model={self.d_model}, num_experts={self.num_experts}, top_k={self.top_k}"


class NormRouter(_Router):
    """UniPool's router: top-k of scale * c * relu(z / |z|_2), z = x W^T (arXiv:2605.06665).

    Args:
        d_model: D.
        num_experts: M of the pool.
        top_k: experts per token, at most min(M, 16).
        eps: guards rows of zeros.

    Attributes:
        weight: [M, D].
        scale: the learnable sigma, [1] float32, 1 at the start.
        calibration: the constant c(M, k), a float.
    """

    def __init__(
        self,
        d_model: int,
        num_experts: int,
        top_k: int,
        *,
        eps: float = 1e-8,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__(d_model, num_experts, top_k, device, dtype)
        self.eps = eps
        self.calibration = norm_router_calibration(num_experts, top_k)
        self.scale = new_scale(self, device)
        self.reset_parameters()

    def reset_parameters(self, std: float | None = None) -> None:
        super().reset_parameters(std)
        nn.init.ones_(self.scale)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Routing:
        """x [T, D]; mask [M] bool, True hides an expert -> Routing."""
        return norm_routing(self, self.logits(x), mask)


class SoftmaxRouter(_Router):
    """The router of layer-private baselines: top-k of softmax(x W^T), not renormalised by default.

    Args:
        d_model: D.
        num_experts: M.
        top_k: experts per token, at most min(M, 16).
        renormalize: divide the k weights by their sum; refused for top_k = 1, where the router
            would get no gradient from the task.
    """

    def __init__(
        self,
        d_model: int,
        num_experts: int,
        top_k: int,
        *,
        renormalize: bool = False,
        device=None,
        dtype=None,
    ) -> None:
        if renormalize and top_k == 1:
            raise ValueError(
                "SoftmaxRouter: renormalize must be False for top_k=1, got True: every weight "
                "would be 1 and the router would get no gradient from the task"
            )
        super().__init__(d_model, num_experts, top_k, device, dtype)
        self.renormalize = renormalize
        self.reset_parameters()

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Routing:
        """x [T, D]; mask [M] bool, True hides an expert -> Routing."""
        return softmax_topk(self.logits(x), self.top_k, renormalize=self.renormalize, mask=mask)
