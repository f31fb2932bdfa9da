# SPDX-License-Identifier: Apache-2.0
"""The named shapes and routings that tests, benchmarks, profiles and documents measure.

A shape without a routing says little: experts are never used alike. Where a benchmark takes one
routing it takes SKEWED; uniform is what publications use, and the best case.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from unipool.scales import SCALES


@dataclass(frozen=True)
class Workload:
    """One layer's experts: T tokens, D, F, M, k; `layers` share the pool, and a weight gradient
    sums over them. tags: ci (small enough for tests), paper (a scale of arXiv:2605.06665), peer
    (others publish figures for it), cpu (where the CPU is measured)."""

    name: str
    tokens: int
    d_model: int
    d_ff: int
    experts: int
    top_k: int = 1
    layers: int = 1
    tags: tuple[str, ...] = ()

    @property
    def rows(self) -> int:
        return self.tokens * self.top_k


def scale(name: str, tokens: int, layers: int | None = None) -> Workload:
    """A scale of the paper with its one pool, at T tokens."""
    s = SCALES[name]
    sizes = (s.hidden_size, s.intermediate_size, s.pool_size)
    return Workload(name, tokens, *sizes, 1, layers or s.num_hidden_layers, ("paper",))


PAPER = [
    *(scale("182m", tokens) for tokens in (8192, 32768, 131072)),
    *(scale("469m", tokens) for tokens in (16384, 65536)),
    *(scale("650m", tokens) for tokens in (16384, 65536)),
    *(scale("830m", tokens) for tokens in (8192, 32768)),
    scale("978m", 16384),
]
SONIC = [  # arXiv:2512.14080: name, T, D, F, M, k
    Workload("SonicMoE 1.4B, k 8", 40960, 768, 256, 128, 8, tags=("peer",)),
    Workload("SonicMoE 1.4B, k 2", 40960, 768, 1024, 32, 2, tags=("peer",)),
    Workload("SonicMoE 7B, k 8", 24576, 1536, 256, 128, 8, tags=("peer",)),
    Workload("SonicMoE 7B, k 2", 24576, 1536, 1024, 32, 2, tags=("peer",)),
    Workload("SonicMoE 30B, F 1024", 32768, 4096, 1024, 64, 4, tags=("peer",)),
    Workload("SonicMoE 30B, F 2048", 32768, 4096, 2048, 64, 4, tags=("peer",)),
]
MODELS = [
    Workload("Qwen3-30B-A3B", 8192, 2048, 768, 128, 8, tags=("peer",)),
    Workload("Qwen3-30B-A3B", 32768, 2048, 768, 128, 8, tags=("peer",)),
    Workload("OLMoE", 32768, 2048, 1024, 64, 8, tags=("peer",)),
    Workload("Mixtral 8x7B", 8192, 4096, 14336, 8, 2, tags=("peer",)),
]
# Models of Hugging Face: as published, at widths for a CPU, and for a rehearsal.
WIDTHS = [
    Workload("mixtral full", 8192, 4096, 14336, 8, 2),
    Workload("qwen3_moe full", 8192, 2048, 768, 128, 8),
    Workload("olmoe full", 8192, 2048, 1024, 64, 8),
    Workload("mixtral small", 1024, 256, 1024, 8, 2, tags=("cpu",)),
    Workload("qwen3_moe small", 1024, 512, 192, 64, 8, tags=("cpu",)),
    Workload("olmoe small", 1024, 512, 256, 32, 8, tags=("cpu",)),
    Workload("mixtral tiny", 16, 32, 64, 4, 2, tags=("ci",)),
    Workload("qwen3_moe tiny", 16, 32, 24, 8, 4, tags=("ci",)),
    Workload("olmoe tiny", 16, 32, 24, 8, 4, tags=("ci",)),
]
CPU = [Workload("cpu", 2048, 256, 1024, 96, 1, 12, ("cpu",))]
CI = [
    Workload("ci pool", 96, 32, 48, 6, 2, 2, ("ci",)),
    Workload("ci one expert per token", 64, 32, 48, 6, 1, 2, ("ci",)),
    Workload("ci odd", 70, 33, 17, 5, 3, 1, ("ci",)),
    Workload("ci many experts", 40, 16, 24, 96, 1, 3, ("ci",)),
]
WORKLOADS = [*PAPER, *SONIC, *MODELS, *WIDTHS, *CPU, *CI]


def named(name: str, tokens: int | None = None) -> Workload:
    """The first workload of that name, or the one with so many tokens."""
    for workload in WORKLOADS:
        if workload.name == name and tokens in (None, workload.tokens):
            return workload
    raise KeyError(f"no workload is named {name!r}" + (f" at T {tokens}" if tokens else ""))


# --- routings: the probability of each expert in one layer


def uniform(experts: int, generator: torch.Generator) -> Tensor:
    return torch.ones(experts)


def zipf(experts: int, generator: torch.Generator) -> Tensor:
    """Probability 1 / rank, ranks shuffled."""
    ranks = 1 + torch.randperm(experts, generator=generator)
    return 1.0 / ranks


def quarter(experts: int, generator: torch.Generator) -> Tensor:
    """Each layer on M/4 experts of its own."""
    return (torch.randperm(experts, generator=generator) < max(experts // 4, 1)).float()


def half_to_one(experts: int, generator: torch.Generator) -> Tensor:
    chances = torch.ones(experts)
    chances[torch.randint(experts, (), generator=generator)] = max(experts - 1, 1)
    return chances


def thirty_percent_empty(experts: int, generator: torch.Generator) -> Tensor:
    return (torch.randperm(experts, generator=generator) >= 3 * experts // 10).float()


ROUTINGS = {
    "uniform": uniform,
    "zipf": zipf,
    "quarter": quarter,
    "half to one": half_to_one,
    "30% empty": thirty_percent_empty,
}
SKEWED = "zipf"


def draw_counts(workload: Workload, routing: str, generator: torch.Generator) -> Tensor:
    """[M] rows of each expert in one layer, their sum T k, none above T: k independent draws per
    token, what an expert gets beyond T handed to the others."""
    chances = ROUTINGS[routing](workload.experts, generator)
    counts = torch.zeros(workload.experts, dtype=torch.long)
    while missing := workload.rows - int(counts.sum()):
        open_to = torch.where(counts < workload.tokens, chances, 0.0)
        if not open_to.any():  # fewer experts than k are to be used: the others take the rest
            open_to = (counts < workload.tokens).float()
        drawn = torch.multinomial(open_to, missing, replacement=True, generator=generator)
        counts += drawn.bincount(minlength=workload.experts)
        counts.clamp_(max=workload.tokens)
    return counts


def draw_ids(
    workload: Workload, routing: str, generator: torch.Generator, device: str = "cpu"
) -> Tensor:
    """[T, k] int32 ids of one layer, those of a token distinct, by the probabilities of `routing`;
    experts of probability 0 only where k needs them."""
    chances = ROUTINGS[routing](workload.experts, generator).clamp(min=1e-30).to(device)
    on_device = torch.Generator(device).manual_seed(
        int(torch.randint(2**31, (), generator=generator))
    )
    shape = (workload.tokens, workload.experts)
    u = torch.rand(shape, generator=on_device, device=device).clamp_(1e-6, 1 - 1e-6)
    keys = chances.log() - (-u.log()).log()  # sampling without replacement (Gumbel top-k)
    return keys.topk(workload.top_k).indices.int()
