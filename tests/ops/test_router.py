# SPDX-License-Identifier: Apache-2.0
"""The routers against the oracle, and at the edges of their contract."""

import pytest
import torch
from cases import CASES, Case, acc_dtype, logits
from specs import NORM_TOPK, NORM_TOPK_STEERED, ROUTER_SPECS, SOFTMAX_TOPK, pairs, run, to_device
from suite import ROUTER_SIZES, check_against_oracle
from tolerance import check_equal

from unipool import ops


@pytest.mark.parametrize(("spec", "case"), pairs(ROUTER_SPECS), ids=str)
def test_router_forward_backward(spec, case, dtype, device):
    check_against_oracle(spec, case, dtype, device)


@pytest.mark.parametrize("spec", ROUTER_SPECS, ids=str)
@pytest.mark.parametrize(("T", "M", "k"), ROUTER_SIZES)
def test_router_adversarial_sizes(spec, T, M, k, dtype, device):
    if k == 1 and spec.name == "softmax_topk_renormalized":
        k = min(2, M)
        if k == 1:
            return
    check_against_oracle(spec, Case(f"{T}x{M}x{k}", T, M, k, 1, 1), dtype, device)


def dead_rows(case: Case, dtype: torch.dtype) -> torch.Tensor:
    """Logits of tokens of which two in three have no positive one: silent in norm_topk."""
    z = logits(case, dtype)
    dead = torch.arange(case.tokens)[:, None] % 3 > 0
    return torch.where(dead, -z.abs() - 1 / 128, z)


@pytest.mark.parametrize("spec", [NORM_TOPK, NORM_TOPK_STEERED, SOFTMAX_TOPK], ids=str)
@pytest.mark.parametrize("masked", [False, True])
def test_one_slot_a_token_and_ids_of_minus_1(spec, masked, dtype, device):
    """Of silent tokens, and of all where every expert is masked."""
    case = Case("top1_dropped", 130, 12, 1, 1, 1)
    inputs = spec.inputs(case, dtype) | {"logits": dead_rows(case, dtype)}
    if masked:
        inputs["mask"] = torch.ones(12, dtype=torch.bool)
    check_against_oracle(spec, case, dtype, device, inputs)
    got = run(spec, case, ops, to_device(inputs, device))
    silent = torch.full((130,), masked)
    if spec is NORM_TOPK:
        silent |= torch.arange(130) % 3 > 0
    if spec is not NORM_TOPK_STEERED or masked:  # a bias may choose a silent score
        assert torch.equal(got["experts"].flatten().eq(-1).cpu(), silent)
    assert got["load"].sum() == got["experts"].ge(0).sum()
    assert got["weights"].flatten()[got["experts"].flatten() == -1].eq(0).all()


@pytest.mark.parametrize("spec", ROUTER_SPECS, ids=str)
@pytest.mark.parametrize("T", [1024, 1025, 2050, 4099])
@pytest.mark.parametrize(("M", "k"), [(6, 2), (33, 3)])
def test_more_tokens_than_one_block_of_them(spec, T, M, k, dtype, device):
    """Load and importance are sums over all tokens; a gradient is of each token, the last, too."""
    case = Case(f"many{T}", T, M, k, 1, 1)
    inputs = spec.inputs(case, dtype) | {"logits": dead_rows(case, dtype)}
    check_against_oracle(spec, case, dtype, device, inputs)


def route(op: str, z: torch.Tensor, top_k: int, **options: object) -> ops.Routing:
    if op == "norm_topk":
        scale = torch.ones((), dtype=acc_dtype(z.dtype), device=z.device)
        return ops.norm_topk(z, scale, top_k, **options)
    return ops.softmax_topk(z, top_k, **options)


OPS = ["norm_topk", "softmax_topk"]


@pytest.mark.parametrize("op", OPS)
def test_ties_go_to_the_lower_id(op, device):
    z = torch.tensor([[1.0, 2.0, 2.0, 1.0, 2.0], [3.0] * 5, [-1.0] * 5], device=device)
    got = route(op, z, 4).experts.tolist()
    assert got[0] == [1, 2, 4, 0]
    assert got[1] == [0, 1, 2, 3]
    assert got[2] == ([-1] * 4 if op == "norm_topk" else [0, 1, 2, 3])


def test_scores_of_zero_are_silent(dtype, device):
    """No expert, no load, and neither value nor gradient differ for it."""
    z = logits(Case("silent", 64, 12, 5, 1, 1), dtype).to(device)
    z[::4] = -z[::4].abs()  # whole tokens; others have fewer than 5 positive logits
    leaf = z.clone().requires_grad_()
    scale = torch.full((1,), 1.5, dtype=acc_dtype(dtype), device=device, requires_grad=True)
    got = ops.norm_topk(leaf, scale, 5)
    heard = z.gt(0).sum(1).clamp(max=5)
    assert heard.min() == 0
    assert heard.unique().numel() > 3
    slots = torch.arange(5, device=device)
    assert torch.equal(got.experts >= 0, slots < heard[:, None])
    assert torch.equal(got.weights != 0, got.experts >= 0)
    spoken = got.experts[got.experts >= 0].long()
    check_equal(got.load, torch.bincount(spoken, minlength=12).int())
    grads = torch.randn(64, 5, dtype=got.weights.dtype, device=device)
    got.weights.backward(grads)
    first = leaf.grad.clone(), scale.grad.clone()
    leaf.grad = scale.grad = None
    loud = grads.masked_fill(got.experts < 0, 1e6)  # of slots that no expert saw
    ops.norm_topk(leaf, scale, 5).weights.backward(loud)
    assert torch.equal(leaf.grad, first[0])
    assert torch.equal(scale.grad, first[1])


def test_a_score_that_is_biased_up_to_the_top_may_be_silent(device):
    z = torch.tensor([[3.0, -1.0, 2.0], [-1.0, 1.0, -2.0]], device=device)
    bias = torch.tensor([0.0, 10.0, 0.0], device=device)
    routing = route("norm_topk", z, 2, bias=bias)
    assert routing.experts.tolist() == [[-1, 0], [1, -1]]
    assert routing.load.tolist() == [1, 1, 0]


def test_softmax_topk_of_negative_logits_takes_the_greatest(device):
    z = -torch.rand(9, 20, device=device) - 5.0
    check_equal(route("softmax_topk", z, 3).experts, z.topk(3).indices.int())


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("poison", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("share", [0.05, 0.5, 1.0])
def test_non_finite_logits_give_distinct_ids_in_range(op, poison, share, dtype, device):
    T, M, k = 64, 37, 8
    z = torch.randn(T, M)
    z[torch.rand(T, M) < share] = poison
    routing = route(op, z.to(device, dtype), k)
    ids = routing.experts.cpu().long()
    silent = routing.weights.cpu() == 0 if op == "norm_topk" else torch.zeros_like(ids).bool()
    assert torch.equal(ids == -1, silent)  # beside an infinity all others may score 0
    heard = [[e for e in row if e != -1] for row in ids.tolist()]
    assert ids.max() < M
    assert all(len(set(row)) == len(row) for row in heard)
    check_equal(routing.load, torch.bincount(ids[ids >= 0], minlength=M).int())


@pytest.mark.parametrize("op", OPS)
def test_one_nan_row_surfaces_and_stays_in_its_row(op, device):
    case = Case("nan_row", 40, 24, 4, 1, 1)
    z = logits(case, torch.float32).to(device)
    clean = route(op, z, 4)
    z = z.clone()
    z[7, 3] = torch.nan
    z.requires_grad_()
    routing = route(op, z, 4)
    assert routing.weights[7].isnan().any(), "a NaN must reach the loss"
    others = torch.arange(40, device=device) != 7
    assert torch.equal(routing.weights[others], clean.weights[others])
    assert torch.equal(routing.experts[others], clean.experts[others])
    routing.weights.sum().backward()
    assert z.grad[others].isfinite().all()
    assert z.grad[7].isnan().any()


@pytest.mark.parametrize("op", OPS)
def test_mask_hides_values_and_takes_no_part(op, device):
    """The result equals that of the logits without the masked columns, NaN in them or not."""
    case = Case("mask", 33, 20, 3, 1, 1)
    z = logits(case, torch.float32).to(device)
    mask = torch.arange(20, device=device) % 3 == 0
    keep = (~mask).nonzero().flatten()
    poisoned = z.masked_fill(mask, torch.nan).requires_grad_()
    got = route(op, poisoned, 3, mask=mask)
    due = route(op, z[:, keep].contiguous(), 3)
    check_equal(got.experts, keep[due.experts.long()].int())
    torch.testing.assert_close(got.weights, due.weights)
    torch.testing.assert_close(got.importance[keep], due.importance)
    assert got.importance[mask].eq(0).all()
    assert got.load[mask].eq(0).all()
    (got.weights.sum() + got.importance.sum()).backward()
    assert poisoned.grad.isfinite().all()
    assert poisoned.grad[:, mask].eq(0).all()


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("left", [0, 1, 2])
def test_fewer_experts_left_than_k(op, left, dtype, device):
    z = (torch.rand(11, 6) + 0.1).to(device, dtype).requires_grad_()
    mask = torch.arange(6, device=device) >= left
    routing = route(op, z, 3, mask=mask)
    assert routing.experts[:, left:].eq(-1).all()
    assert routing.weights[:, left:].eq(0).all()
    assert all(sorted(row[:left]) == list(range(left)) for row in routing.experts.tolist())
    assert routing.load.tolist() == [11] * left + [0] * (6 - left)
    (routing.weights.sum() + routing.importance.sum()).backward()
    assert z.grad.isfinite().all()
    assert z.grad[:, left:].eq(0).all()


def test_renormalized_weights_with_spare_slots(device):
    """They sum to 1 over the experts that are left, and to 0 where none is."""
    z = torch.randn(5, 4, device=device)
    for left, total in [(2, 1.0), (0, 0.0)]:
        mask = torch.arange(4, device=device) >= left
        got = ops.softmax_topk(z, 3, renormalize=True, mask=mask).weights.sum(-1)
        torch.testing.assert_close(got, torch.full_like(got, total))


@pytest.mark.parametrize("op", OPS)
def test_bias_steers_the_choice_only(op, device):
    """A biased expert is chosen by every token with its unbiased score as weight, and the bias gets
    no gradient."""
    case = Case("bias", 50, 12, 2, 1, 1)
    z = logits(case, torch.float32).abs().to(device)
    bias = torch.zeros(12, device=device)
    bias[5] = 1e3
    plain, steered = route(op, z, 12), route(op, z, 2, bias=bias)
    assert steered.experts[:, 0].eq(5).all()
    score_of_5 = plain.weights.gather(1, plain.experts.eq(5).int().argmax(1, keepdim=True))
    assert torch.equal(steered.weights[:, :1], score_of_5)
    assert torch.equal(plain.importance, steered.importance)
    bias.requires_grad_()
    leaf = z.clone().requires_grad_()
    route(op, leaf, 2, bias=bias).weights.sum().backward()
    assert bias.grad is None
    assert leaf.grad.ne(0).any()


@pytest.mark.parametrize("op", OPS)
def test_a_bias_of_minus_infinity_is_the_last_choice(op, device):
    z = torch.rand(20, 4, device=device) + 0.1
    bias = torch.tensor([-torch.inf, 0.0, 0.0, 0.0], device=device)
    routing = route(op, z, 4, bias=bias)
    assert routing.experts[:, 3].eq(0).all()
    assert routing.weights.isfinite().all()


@pytest.mark.parametrize("op", OPS)
def test_load_and_importance_sum_up(op, dtype, device):
    case = Case("sums", 200, 48, 4, 1, 1)
    routing = route(op, logits(case, dtype).to(device), 4)
    assert int(routing.load.sum()) == 200 * 4
    everything = route(op, logits(case, dtype).to(device), 16)
    assert routing.importance.sum() >= everything.weights.sum() * (1 - 1e-5)
    if op == "softmax_topk":
        torch.testing.assert_close(routing.importance.sum().item(), 200.0)


def test_zero_row_gets_zero_gradient(dtype, device):
    """At ||z|| = 0 the formula divides by eps = 1e-8; relu'(0) = 0 wins."""
    z = torch.zeros(3, 10, dtype=dtype, device=device, requires_grad=True)
    scale = torch.ones((), device=device, dtype=acc_dtype(dtype), requires_grad=True)
    routing = ops.norm_topk(z, scale, 2)
    (routing.weights.sum() + routing.importance.sum()).backward()
    assert z.grad.eq(0).all()
    assert scale.grad.eq(0).all()


@pytest.mark.parametrize("value", [1e-30, 1e-12, 1e12, 1e18])
def test_scores_do_not_depend_on_the_size_of_logits(value, device):
    """(2) is scale free far above eps and finite everywhere."""
    z = logits(Case("size", 16, 8, 2, 1, 1), torch.float32).to(device)
    leaf = (z * value).requires_grad_()
    routing = route("norm_topk", leaf, 2)
    assert routing.weights.isfinite().all()
    if value > 1:
        torch.testing.assert_close(routing.weights, route("norm_topk", z, 2).weights)
    routing.weights.sum().backward()
    assert leaf.grad.isfinite().all()


def test_large_logits_do_not_overflow_softmax(device):
    z = torch.tensor([[1e4, 0.0, -1e4], [3e38, 3e38, -3e38]], device=device, requires_grad=True)
    routing = ops.softmax_topk(z, 2)
    torch.testing.assert_close(routing.weights.tolist(), [[1.0, 0.0], [0.5, 0.5]])
    routing.weights.sum().backward()
    assert z.grad.isfinite().all()


def test_only_importance_or_only_weights_used(device):
    """The unused output's gradient is no zero tensor but nothing: both paths must stand alone."""
    case = next(c for c in CASES if c.name == "ragged")
    z = logits(case, torch.float32).to(device)
    both = []
    for use in (("weights",), ("importance",), ("weights", "importance")):
        leaf = z.clone().requires_grad_()
        routing = route("norm_topk", leaf, 2)
        sum(getattr(routing, name).pow(2).sum() for name in use).backward()
        both.append(leaf.grad)
    torch.testing.assert_close(both[0] + both[1], both[2])


@pytest.mark.parametrize("M", [1, 4, 96])
def test_renormalize_with_one_expert_a_token_is_refused(M, device):
    with pytest.raises(ValueError, match="softmax_topk: renormalize"):
        ops.softmax_topk(torch.randn(3, M, device=device), 1, renormalize=True)


@pytest.mark.parametrize("spec", [NORM_TOPK, SOFTMAX_TOPK], ids=str)
def test_every_token_count_up_to_300(spec, device):
    for T in range(0, 300, 7):
        check_against_oracle(spec, Case(f"T{T}", T, 24, 2, 1, 1), torch.float32, device)
