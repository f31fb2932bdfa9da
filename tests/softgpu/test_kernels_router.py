# SPDX-License-Identifier: Apache-2.0
"""The router kernels against float64, under several schedules with the checker on."""

from dataclasses import dataclass, replace

import oracle
import pytest
import torch
from kernel_library import bits_equal, under_schedules
from launchers import Launchers, misaligned
from torch import Tensor

EPS32 = torch.finfo(torch.float32).eps


@dataclass(frozen=True)
class Case:
    """Sizes, dtype, and what is special about the logits."""

    tokens: int
    experts: int
    top_k: int
    dtype: torch.dtype = torch.float32
    logits: str = "normal"
    masked: int = 0  # how many experts
    biased: bool = False
    misaligned: bool = False
    scale: float = 1.3

    def __str__(self) -> str:
        flags = [self.logits] * (self.logits != "normal") + ["bias"] * self.biased
        flags += [f"masked{self.masked}"] * (self.masked > 0) + ["misaligned"] * self.misaligned
        dtype = str(self.dtype).removeprefix("torch.")
        return "-".join([f"T{self.tokens}-M{self.experts}-k{self.top_k}-{dtype}", *flags])

    def inputs(self) -> dict[str, Tensor]:
        """Logits on a grid, so that experts tie exactly or differ by more than rounding errors."""
        g = torch.Generator().manual_seed(self.tokens * 1000 + self.experts + self.top_k)
        z = torch.randn(self.tokens, self.experts, generator=g)
        if self.logits == "ties":
            z = z.round()
        if self.logits == "negative":
            z = -z.abs() - 0.01
        if self.logits == "zero":
            z = torch.zeros_like(z)
        if self.logits == "huge":  # the squares overflow
            z = z * 1e30
        if self.logits == "tiny":  # the squares underflow
            z = z * 1e-30
        z = z.to(self.dtype) if self.logits in ("huge", "tiny") else _on_grid(z).to(self.dtype)
        inputs = {"logits": misaligned(z) if self.misaligned else z}
        if self.biased:
            inputs["bias"] = _on_grid(torch.randn(self.experts, generator=g) * 0.3)
        if self.masked:
            hidden = torch.randperm(self.experts, generator=g)[: self.masked]
            inputs["mask"] = torch.zeros(self.experts, dtype=torch.bool).index_fill(0, hidden, True)
        return inputs


def _on_grid(z: Tensor) -> Tensor:
    return (z * 128).round() / 128


CASES = [
    Case(0, 96, 8),
    Case(1, 1, 1),
    Case(1, 3, 2, torch.bfloat16),
    Case(127, 96, 8),
    Case(128, 160, 2, torch.float16),
    Case(129, 128, 8, torch.bfloat16),
    Case(33, 384, 1),
    Case(20, 1024, 16),
    Case(9, 1024, 1, torch.bfloat16),
    Case(7, 512, 2, torch.float16),
    Case(40, 16, 16),
    Case(65, 120, 2, masked=5),
    Case(12, 24, 16, masked=20),
    Case(6, 12, 4, masked=12),
    Case(31, 96, 8, biased=True),
    Case(31, 384, 2, torch.bfloat16, biased=True, masked=3),
    Case(50, 24, 4, logits="ties"),
    Case(50, 96, 8, torch.bfloat16, logits="negative"),
    Case(10, 100, 3, logits="zero"),
    Case(21, 96, 2, logits="huge"),
    Case(21, 384, 2, logits="tiny"),
    Case(17, 97, 2, misaligned=True),
    Case(17, 96, 2, torch.bfloat16, misaligned=True),
    Case(9, 300, 16, misaligned=True),
]
SCORES = ["norm", "softmax", "renormalized"]


def _scores(case: Case, score: str, z: Tensor, scale: Tensor, mask: Tensor | None) -> Tensor:
    if score == "norm":
        return oracle.norm_scores(z, scale, 2.0, _eps(case), mask)
    return oracle.softmax_scores(z, mask)


def _eps(case: Case) -> float:
    return 1e-38 if case.logits == "tiny" else 1e-8


def _forward(ops: Launchers, case: Case, score: str, inputs: dict[str, Tensor]) -> list[Tensor]:
    if score == "norm":
        scale = torch.tensor([case.scale])
        options = {"calibration": 2.0, "eps": _eps(case)}
        return ops.norm_topk(inputs["logits"], scale, case.top_k, **_optional(inputs), **options)
    renormalize = score == "renormalized"
    optional = _optional(inputs)
    return ops.softmax_topk(inputs["logits"], case.top_k, renormalize=renormalize, **optional)


def _optional(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: inputs[name] for name in ("bias", "mask") if name in inputs}


def _close(
    actual: Tensor, expected: Tensor, terms: int, eps: float = EPS32, size: Tensor | None = None
) -> None:
    """Bound for sums of `terms` float32 terms of size `size`, by default the greatest value."""
    assert torch.equal(actual.isnan(), expected.isnan())
    if size is None:
        size = expected.nan_to_num(0.0).abs().max() if expected.numel() else torch.tensor(0.0)
    error = (actual.double() - expected).nan_to_num(0.0).abs()
    assert not (error > (8 * terms**0.5 * EPS32 + eps) * size).any(), f"off by {error.max()}"


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_forward(ops: Launchers, case: Case, score: str) -> None:
    if score == "softmax" and case.logits == "huge":
        pytest.skip("float32 probabilities underflow to ties that float64 tells apart")
    if score == "renormalized" and (case.logits == "huge" or case.top_k == 1):
        pytest.skip("not defined")
    inputs = case.inputs()
    z, mask, bias = inputs["logits"].double(), inputs.get("mask"), inputs.get("bias")
    weights, experts, load, importance = under_schedules(lambda: _forward(ops, case, score, inputs))
    s = _scores(case, score, z, torch.tensor(case.scale), mask)
    # Ties are decided on float32 scores.
    chosen = oracle.choose(s.float().double(), case.top_k, bias, mask, score == "norm")
    assert torch.equal(experts, chosen)
    assert torch.equal(load, oracle.load_of(chosen, case.experts))
    _close(weights, oracle.weights_of(s, chosen, score == "renormalized"), case.experts)
    _close(importance, s.sum(0), case.experts * max(case.tokens, 1))


@pytest.mark.parametrize(
    ("case", "given"),
    [(case, "both") for case in CASES]
    + [(case, given) for case in CASES[3:5] for given in ("weights", "importance", "none")],
    ids=str,
)
@pytest.mark.parametrize("score", SCORES)
def test_backward(ops: Launchers, case: Case, score: str, given: str) -> None:
    if score != "norm" and case.logits == "huge":
        pytest.skip("not defined")
    if score == "renormalized" and case.top_k == 1:
        pytest.skip("not defined")
    inputs = case.inputs()
    logits, mask = inputs["logits"], inputs.get("mask")
    z = logits.double().requires_grad_()
    scale = torch.tensor(case.scale, dtype=torch.float64, requires_grad=True)
    s = _scores(case, score, z, scale, mask)
    bias, silent = inputs.get("bias"), score == "norm"
    experts = oracle.choose(s.float().double(), case.top_k, bias, mask, silent)
    g = torch.Generator().manual_seed(1)
    gw = torch.randn(case.tokens, case.top_k, generator=g)
    gi = torch.randn(case.experts, generator=g)
    w = oracle.weights_of(s, experts, score == "renormalized")
    loss = s.sum() * 0
    if given in ("both", "weights"):
        loss = loss + (w * gw.double()).sum()
    if given in ("both", "importance"):
        loss = loss + (s.sum(0) * gi.double()).sum()
    want_z, want_scale = torch.autograd.grad(loss, [z, scale], allow_unused=True)
    gw = gw if given in ("both", "weights") else None
    gi = gi if given in ("both", "importance") else None

    def run() -> list[Tensor]:
        if score == "norm":
            options = {"calibration": 2.0, "eps": _eps(case), "mask": mask}
            s32 = scale.detach().float().view(1)
            return ops.norm_topk_bwd(gw, gi, logits, s32, experts, **options)
        options = {"renormalize": score == "renormalized", "mask": mask}
        return ops.softmax_topk_bwd(gw, gi, logits, experts, **options)

    got = under_schedules(run)
    # Terms of the size of the scores' own gradients cancel.
    size = max([t.abs().max().item() for t in (gw, gi) if t is not None and t.numel()], default=0.0)
    size = torch.tensor(size, dtype=torch.float64)
    if score == "norm":
        terms = size * case.scale * 2.0
        _close(got[1], want_scale.view(1), case.tokens * case.experts, size=terms)
        unmasked = z.detach() if mask is None else z.detach().masked_fill(mask, 0.0)
        size = terms / (unmasked.norm(dim=1, keepdim=True) + _eps(case))
    elif score == "renormalized":
        chosen = oracle.weights_of(s.detach(), experts).sum(1, keepdim=True)
        size = size * s.detach() / chosen.clamp(max=1.0).masked_fill(chosen == 0, 1.0)
    _close(got[0], want_z.nan_to_num(0.0), case.experts, torch.finfo(case.dtype).eps, size)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("score", ["norm", "softmax"])
def test_nan_and_infinite_logits(ops: Launchers, score: str, dtype: torch.dtype) -> None:
    """Ids stay distinct and in range; a NaN is the greatest and shows in the weights; beside an
    infinity others have a NormRouter score of 0 and are silent."""
    case = Case(8, 96, 8, dtype)
    inputs = case.inputs()
    z = inputs["logits"]
    z[1, 70] = float("nan")
    z[2, 40] = float("inf")
    z[3, 5] = -float("inf")
    z[4] = float("nan")
    z[5] = -float("inf")
    z[6, [90, 3]] = float("inf")
    weights, experts, load, _ = under_schedules(lambda: _forward(ops, case, score, inputs))
    s = _scores(case, score, z.double(), torch.tensor(case.scale), None)
    silent = score == "norm"
    assert torch.equal(experts, oracle.choose(s.float().double(), case.top_k, None, None, silent))
    for row in experts.tolist():
        heard = [expert for expert in row if expert >= 0]
        assert len(set(heard)) == len(heard)
        assert len(heard) == case.top_k or silent
    assert int(load.sum()) == int((experts >= 0).sum())
    _close(weights, oracle.weights_of(s, experts), case.experts)


def test_masked_nan_is_not_seen(ops: Launchers) -> None:
    case = Case(5, 24, 2, masked=4)
    inputs = case.inputs()
    clean = _forward(ops, case, "norm", inputs)
    inputs["logits"][:, inputs["mask"]] = float("nan")
    for a, b in zip(clean, _forward(ops, case, "norm", inputs), strict=True):
        assert bits_equal(a, b)


def test_negative_scale_turns_the_order(ops: Launchers) -> None:
    case = Case(9, 96, 4, scale=-0.7)
    inputs = case.inputs()
    _, experts, _, _ = _forward(ops, case, "norm", inputs)
    s = _scores(case, "norm", inputs["logits"].double(), torch.tensor(-0.7), None)
    assert torch.equal(experts, oracle.choose(s.float().double(), 4, None, None, silent=True))


@pytest.mark.parametrize("tokens", [3168 + 1, 3 * 3168 + 5])
def test_many_tokens(ops: Launchers, tokens: int) -> None:
    """More than one token per warp: 396 blocks of 8 warps take the rows in turns."""
    case = Case(tokens, 132, 1)
    inputs = case.inputs()
    weights, experts, load, importance = _forward(ops, case, "norm", inputs)
    s = _scores(case, "norm", inputs["logits"].double(), torch.tensor(case.scale), None)
    chosen = oracle.choose(s.float().double(), 1, None, None, silent=True)
    assert torch.equal(experts, chosen)
    assert torch.equal(load, oracle.load_of(chosen, case.experts))
    _close(weights, oracle.weights_of(s, chosen), case.experts)
    _close(importance, s.sum(0), case.experts * case.tokens)


def test_wrong_sizes_are_refused(ops: Launchers) -> None:
    z = torch.zeros(2, 4)
    for logits, top_k in ((z, 5), (z, 0), (torch.zeros(2, 1025), 1), (torch.zeros(2, 40), 17)):
        with pytest.raises(RuntimeError, match=r"norm_topk: 1$"):  # cudaErrorInvalidValue
            ops.norm_topk(logits, torch.ones(1), top_k)


def test_rows_do_not_depend_on_others(ops: Launchers) -> None:
    """The same row gives the same bits wherever it stands."""
    case = Case(40, 96, 8)
    inputs = case.inputs()
    weights, experts, _, _ = _forward(ops, case, "norm", inputs)
    order = torch.randperm(case.tokens, generator=torch.Generator().manual_seed(0))
    shuffled = replace(case)
    w2, e2, _, _ = _forward(ops, shuffled, "norm", {"logits": inputs["logits"][order]})
    assert bits_equal(w2, weights[order])
    assert torch.equal(e2, experts[order])
