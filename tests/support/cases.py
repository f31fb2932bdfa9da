# SPDX-License-Identifier: Apache-2.0
"""Named problem sizes, and the inputs of every op at those sizes; shared by the tests and bench/.

Inputs are scaled so that results are of order 1, so an absolute error means something. Router
logits lie on a grid of 1/128: two experts of a token then tie exactly or differ by far more than a
rounding error of the scores, and integer results can be compared for equality in every dtype.
"""

import zlib
from dataclasses import dataclass

import torch
from torch import Tensor

from unipool import reference
from unipool.ops import DispatchPlan


@dataclass(frozen=True)
class Case:
    """T tokens, M experts, k a token, widths D and F; `routing` names the pattern of expert ids."""

    name: str
    tokens: int
    experts: int
    top_k: int
    d_model: int
    d_ff: int
    routing: str = "uniform"
    logits: str = "normal"
    seed: int = 0

    def __str__(self) -> str:
        return self.name

    def generator(self, *what: object) -> torch.Generator:
        """One stream of random numbers for each (case, what), the same on every machine and run."""
        key = repr((self.name, self.seed, *what)).encode()
        return torch.Generator().manual_seed(zlib.crc32(key))


CASES = [
    Case("empty", 0, 4, 2, 16, 8),
    Case("one_token", 1, 1, 1, 8, 8),
    Case("all_to_one_expert", 64, 8, 1, 32, 16, routing="one"),
    Case("dead_row", 33, 12, 2, 16, 24, logits="dead"),
    Case("ties", 129, 24, 4, 24, 8, logits="ties"),
    Case("ragged", 127, 96, 2, 100, 7, routing="zipf"),
    Case("M_not_pow2", 128, 160, 8, 16, 33),
    Case("dropped", 65, 3, 2, 33, 100, routing="dropped"),
    Case("all_dropped", 17, 5, 2, 8, 16, routing="none"),
    Case("k_is_M", 40, 16, 16, 7, 12),
    Case("pool_384", 130, 384, 2, 24, 16, routing="zipf"),
    Case("pool_1024", 64, 1024, 1, 8, 4),
    Case("bench_small", 512, 96, 1, 64, 128),
]
BY_NAME = {case.name: case for case in CASES}
# One layer at the size for which the project promises a speed on the CPU.
BENCH = Case("bench", 2048, 96, 1, 256, 1024)


# --- inputs


def rand(case: Case, what: str, *shape: int, std: float = 1.0) -> Tensor:
    """Normal numbers, float64."""
    return torch.randn(shape, generator=case.generator(what), dtype=torch.float64) * std


def logits(case: Case, dtype: torch.dtype) -> Tensor:
    """[T, M] on a grid of 1/128 (see the module's docstring); bfloat16 rounds it further."""
    z = rand(case, "logits", case.tokens, case.experts)
    if case.logits == "ties":
        z = z.round()
    if case.logits == "dead":
        z = torch.where(torch.arange(case.tokens).unsqueeze(1) % 4 > 0, -z.abs(), z)
        z[-1:] = 0.0
    return z.mul(128).round().div(128).to(dtype)


def expert_ids(case: Case, layer: int = 0) -> Tensor:
    """[T, k] int32; ids of a token are distinct but for the dropped ones."""
    T, M, k = case.tokens, case.experts, case.top_k
    popularity = torch.zeros(M)
    if case.routing == "zipf":
        popularity = -1.2 * torch.arange(1, M + 1).log()
    if case.routing == "one":
        popularity[M // 2] = 1e6
    u = torch.rand(T, M, generator=case.generator("ids", layer)).clamp(1e-6, 1 - 1e-6)
    ids = (popularity - (-u.log()).log()).topk(k).indices.int()  # sampled without replacement
    if case.routing in ("dropped", "none"):
        chance = 0.3 if case.routing == "dropped" else 1.0
        drop = torch.rand(T, k, generator=case.generator("drop", layer)) < chance
        ids = torch.where(drop, torch.tensor([-1, M, 2**31 - 1]).int()[ids % 3], ids)
    return ids


def plan(case: Case, device: torch.device | str = "cpu") -> DispatchPlan:
    result = reference.dispatch_plan(expert_ids(case), case.experts)
    return DispatchPlan(*(t.to(device) for t in result))


def acc_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def weights(case: Case, dtype: torch.dtype) -> Tensor:
    """Router weights [T, k] in [0.25, 1), divided so that a token's norm is about 1."""
    u = torch.rand(case.tokens, case.top_k, generator=case.generator("weights"), dtype=torch.double)
    return (0.25 + 0.75 * u).div(case.top_k**0.5 * 0.66).to(acc_dtype(dtype))


def pool(case: Case, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """gate_up [M, 2F, D] and down [M, D, F] that keep the variance of a token near 1."""
    M, D, F = case.experts, case.d_model, case.d_ff
    gate_up = rand(case, "gate_up", M, 2 * F, D, std=D**-0.5)
    down = rand(case, "down", M, D, F, std=(0.36 * F) ** -0.5)  # E[silu(g)^2] = 0.36
    return gate_up.to(dtype), down.to(dtype)
