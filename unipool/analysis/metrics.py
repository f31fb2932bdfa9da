# SPDX-License-Identifier: Apache-2.0
"""Statistics of routings, as functions of tensors; logarithms are to base 2.

Notation: T tokens, k experts per token, M experts. `experts` tensors are [T, k], distinct ids in
[0, M), or -1 for a slot without an expert, which counts nowhere.
"""

from collections.abc import Sequence
from itertools import combinations
from typing import NamedTuple

import torch
from torch import Tensor

CHUNK = 1 << 16  # columns of a weight matrix that are converted to float64 at a time


def expert_load(experts: Tensor, num_experts: int) -> Tensor:
    """int64 [M]: number of (token, slot) pairs that each expert got."""
    flat = experts.flatten().long()
    return torch.bincount(flat[flat >= 0], minlength=num_experts)


def entropy(weights: Tensor) -> Tensor:
    """H = -sum_e p_e log2 p_e in bits, p = weights / their sum over the last dimension.

    weights: [..., M], not negative; 0 log 0 = 0, and a row of zeros has entropy 0 (Shannon 1948).
    Returns [...] float64. 2^H is the effective number of experts: M if all weigh the same.
    """
    p = weights.double()
    total = p.sum(dim=-1, keepdim=True)
    return torch.special.entr(p / torch.where(total == 0, 1.0, total)).sum(-1) / torch.log(
        torch.tensor(2.0, dtype=torch.float64, device=p.device)
    )


def gini(load: Tensor) -> float:
    """G = sum_ij |x_i - x_j| / (2 M sum_i x_i): 0 if all experts got the same, 1 - 1/M if one got
    everything; 0 for no load at all (Gini 1912). load: [M]."""
    x = load.double().sort().values
    count, total = x.numel(), x.sum().item()
    if total == 0:
        return 0.0
    ranks = torch.arange(1, count + 1, dtype=torch.float64, device=x.device)
    return (((2 * ranks - count - 1) * x).sum() / (count * total)).item()


def jaccard(a: Tensor, b: Tensor) -> float:
    """Mean over tokens of |A_t & B_t| / |A_t | B_t|, the sets of experts of token t in two layers.

    a [T, k], b [T, k']: ids of the same pool. Tokens without any expert in either are left out.
    """
    both = ((a[:, :, None] == b[:, None, :]) & (a >= 0)[:, :, None]).sum(dim=(1, 2)).double()
    either = (a >= 0).sum(1) + (b >= 0).sum(1) - both
    kept = either > 0
    return (both[kept] / either[kept]).mean().item() if bool(kept.any()) else 0.0


def mutual_information(a: Tensor, b: Tensor, num_a: int, num_b: int) -> float:
    """I(A; B) = sum_ij p_ij log2(p_ij / (p_i q_j)) in bits between the choices of two layers.

    p_ij is the joint frequency of (expert i in the first layer, expert j in the second) for a token
    drawn uniformly and one of its k slots drawn in each layer; with k = 1, of its experts. This
    plug-in estimate is biased upwards by about (M - 1)^2 / (2 T ln 2) bits: compare it with
    shuffled tokens. Cross-layer information of routing is due to RMoE (arXiv:2408.06793).
    """
    pairs = a.long()[:, :, None] * num_b + b.long()[:, None, :]
    valid = (a >= 0)[:, :, None] & (b >= 0)[:, None, :]
    joint = torch.bincount(pairs[valid], minlength=num_a * num_b).view(num_a, num_b)
    bits = entropy(joint.sum(1)) + entropy(joint.sum(0)) - entropy(joint.flatten())
    return max(0.0, bits.item())


class CrossLayer(NamedTuple):
    """Four matrices [L, L], float64, symmetric, NaN on the diagonal. The Jaccard index is NaN also
    between layers of different pools, where an id does not mean the same expert."""

    jaccard: Tensor
    jaccard_shuffled: Tensor
    information: Tensor
    information_shuffled: Tensor


def cross_layer(
    experts: Sequence[Tensor],
    pools: Sequence[int],
    num_experts: Sequence[int],
    shuffles: int = 3,
    seed: int = 0,
) -> CrossLayer:
    """Jaccard index and mutual information of every two layers, and their mean over `shuffles`
    random pairings of the tokens, which is what they come to without any relation."""
    layers = len(experts)
    result = CrossLayer(*(torch.full((layers, layers), torch.nan).double() for _ in range(4)))
    generator = torch.Generator().manual_seed(seed)
    orders = [torch.randperm(len(experts[0]), generator=generator) for _ in range(shuffles)]

    def put(matrix: Tensor, i: int, j: int, values: list[float]) -> None:
        matrix[i, j] = matrix[j, i] = sum(values) / len(values)

    for i, j in combinations(range(layers), 2):
        a, b, sizes = experts[i], experts[j], (num_experts[i], num_experts[j])
        put(result.information, i, j, [mutual_information(a, b, *sizes)])
        put(
            result.information_shuffled,
            i,
            j,
            [mutual_information(a, b[order], *sizes) for order in orders],
        )
        if pools[i] == pools[j]:
            put(result.jaccard, i, j, [jaccard(a, b)])
            put(result.jaccard_shuffled, i, j, [jaccard(a, b[order]) for order in orders])
    return result


@torch.no_grad()
def weight_similarity(*weights: Tensor) -> Tensor:
    """Cosine of every two experts' weights, all their matrices as one vector: float64 [M, M].

    weights: tensors [M, ...]. As in RMoE's comparison of experts (arXiv:2408.06793); 0 for an
    expert whose weights are all zero. Works through the columns in chunks, so that no second copy
    of the weights is made.
    """
    count = weights[0].shape[0]
    gram = torch.zeros(count, count, dtype=torch.float64)
    for weight in weights:
        rows = weight.detach().reshape(count, -1)
        for start in range(0, rows.shape[1], CHUNK):
            part = rows[:, start : start + CHUNK].double()
            gram += (part @ part.T).cpu()
    norm = gram.diagonal().sqrt()
    scale = norm[:, None] * norm
    return gram / torch.where(scale == 0, 1.0, scale)


def mean_off_diagonal(matrix: Tensor) -> float | None:
    """Mean of a square matrix without its diagonal and without NaN; None if nothing is left."""
    rest = matrix[~torch.eye(len(matrix), dtype=torch.bool, device=matrix.device)]
    rest = rest[~rest.isnan()]
    return rest.mean().item() if rest.numel() else None
