# SPDX-License-Identifier: Apache-2.0
"""The problems that mutants are judged on."""

from functools import cache

import torch
from cases import BY_NAME, Case
from specs import (
    EXPERT_MLP,
    GROUPED_MM,
    NORM_TOPK,
    NORM_TOPK_STEERED,
    PERMUTE,
    ROUTER_LOGITS,
    SOFTMAX_TOPK,
    SOFTMAX_TOPK_RENORMALIZED,
    UNPERMUTE_WEIGHTED,
    OpSpec,
    oracle,
    run,
)
from tolerance import check_results
from torch import Tensor
from torch.nn import functional as F

from unipool import reference
from unipool.ops import DispatchPlan, Routing

CASES = {
    **BY_NAME,
    "square": Case("square", 60, 5, 2, 16, 16),  # D = F: a transposed weight still fits
    "square_M": Case("square_M", 60, 16, 2, 16, 8),  # D = M: so does a transposed router's
    "square_dropped": Case("square_dropped", 60, 5, 2, 16, 8, routing="dropped"),
}

DTYPES = [torch.float32, torch.bfloat16]


def router_logits(x, weight, *, fault):
    if fault == "weight_not_transposed":
        return reference.router_logits(x, weight.T)
    if fault == "last_column_of_D_lost":
        return reference.router_logits(x[:, :-1], weight[:, :-1])
    if fault == "last_expert_of_the_next_block":
        return reference.router_logits(x, torch.cat([weight[:-1], weight[:1]]))
    if fault == "x_gets_no_gradient":
        return reference.router_logits(x.detach() + 0 * x, weight)
    logits = reference.router_logits(x, weight)
    if fault == "logits_rounded_to_bfloat16":
        return logits.bfloat16().to(logits.dtype)
    if fault == "logits_are_not_widened":
        return logits.bfloat16()
    return logits


def norm_topk(z, scale, k, *, calibration, bias=None, mask=None, fault):
    """norm_topk with one fault."""
    if fault == "ties_to_the_higher_id":
        r = reference.norm_topk(z.flip(1), scale, k, calibration=calibration, bias=bias, mask=mask)
        ids = (z.shape[1] - 1 - r.experts).int()
        return Routing(r.weights, ids, r.load.flip(0), r.importance.flip(0))
    if fault == "mask_counts_in_the_norm":
        norm = torch.linalg.vector_norm(z.float(), dim=-1, keepdim=True)
        unmasked = z.masked_fill(mask, 0).float()
        ratio = torch.linalg.vector_norm(unmasked, dim=-1, keepdim=True) / norm
        r = reference.norm_topk(z, scale, k, calibration=calibration, bias=bias, mask=mask)
        return r._replace(weights=r.weights * ratio)
    if fault == "mask_ignored":
        return reference.norm_topk(z, scale, k, calibration=calibration, bias=bias)
    if fault == "bias_ignored":
        return reference.norm_topk(z, scale, k, calibration=calibration, mask=mask)
    if fault == "calibration_ignored":
        return reference.norm_topk(z, scale, k, calibration=1.0, bias=bias, mask=mask)
    if fault == "scale_ignored":
        scale = scale * 0 + 1
    if fault == "scale_gets_no_gradient":
        scale = scale.detach() + 0 * scale
    if fault == "eps_too_large":
        options = {"eps": 1e-2, "bias": bias, "mask": mask}
        return reference.norm_topk(z, scale, k, calibration=calibration, **options)
    if fault == "l1_norm":
        l1 = torch.linalg.vector_norm(z.float(), 1, -1, keepdim=True)
        l2 = torch.linalg.vector_norm(z.float(), 2, -1, keepdim=True)
        r = reference.norm_topk(z, scale, k, calibration=calibration)
        return r._replace(weights=r.weights * l2 / l1.clamp(min=1e-6))
    r = reference.norm_topk(z, scale, k, calibration=calibration, bias=bias, mask=mask)
    if fault == "bias_leaks_into_weights":
        return r._replace(weights=r.weights + bias[r.experts.clamp(min=0).long()])
    if fault == "weights_renormalized":
        return r._replace(weights=F.normalize(r.weights, dim=-1))
    if fault == "importance_of_the_chosen_only":
        chosen = torch.zeros_like(z, dtype=torch.float32).scatter(
            1, r.experts.clamp(min=0).long(), r.weights
        )
        return r._replace(importance=chosen.sum(0))
    if fault == "importance_is_a_mean":
        return r._replace(importance=r.importance / z.shape[0])
    if fault == "importance_gets_no_gradient":
        return r._replace(importance=r.importance.detach())
    if fault == "weights_get_no_gradient":
        return r._replace(weights=r.weights.detach())
    if fault == "norm_is_a_constant_in_backward":
        norm = torch.linalg.vector_norm(z.float(), dim=-1, keepdim=True).detach() + 1e-8
        s = scale * calibration * torch.relu(z.float() / norm)
        return r._replace(weights=s.gather(1, r.experts.long()), importance=s.sum(0))
    if fault == "load_counts_tokens":
        return r._replace(load=(r.load > 0).int())
    if fault == "load_counts_the_first_slot":
        return r._replace(load=torch.bincount(r.experts[:, 0].long(), minlength=z.shape[1]).int())
    if fault == "experts_are_int64":
        return r._replace(experts=r.experts.long())
    return r


def softmax_topk(z, k, *, renormalize, bias=None, mask=None, fault):
    """softmax_topk with one fault."""
    options = {"renormalize": renormalize, "bias": bias, "mask": mask}
    if fault == "never_renormalized":
        options["renormalize"] = False
    if fault == "renormalized":
        options["renormalize"] = True
    if fault == "bias_ignored":
        options["bias"] = None
    r = reference.softmax_topk(z, k, **options)
    if fault == "softmax_over_the_chosen_only":
        return r._replace(weights=torch.softmax(z.float().gather(1, r.experts.long()), -1))
    if fault == "jacobian_is_diagonal":
        p = torch.softmax(z.float().detach(), -1)
        p = p + (z.float() - z.float().detach()) * p
        return r._replace(weights=p.gather(1, r.experts.long()), importance=p.sum(0))
    if fault == "slots_in_id_order":
        ids, at = r.experts.sort(-1)
        return r._replace(experts=ids, weights=r.weights.gather(1, at))
    return r


def permute(x, plan, *, fault):
    rows = reference.permute(x, plan)
    if fault == "row_of_the_slot_not_of_the_token":
        return torch.where(plan.order.unsqueeze(1) >= 0, x[plan.order.long() % x.shape[0]], 0.0)
    if fault == "tail_is_stale":
        return torch.where(plan.order.unsqueeze(1) >= 0, rows, x[-1])
    if fault == "gradient_of_the_first_slot_only":
        first = (plan.order % plan.inverse.shape[1] == 0).unsqueeze(1)
        return torch.where(first, rows, rows.detach())
    return rows


def unpermute(y, plan, weights=None, *, fault):
    out = reference.unpermute(y, plan, weights)
    if fault == "weights_not_applied":
        return reference.unpermute(y, plan) + 0 * weights.sum().to(y.dtype)
    if fault == "weights_of_another_slot":
        return reference.unpermute(y, plan, weights.flip(1))
    if fault == "weights_of_another_token":
        return reference.unpermute(y, plan, weights.roll(1, 0))
    if fault == "last_slot_only":
        inverse = plan.inverse.clone()
        inverse[:, :-1] = -1
        return reference.unpermute(y, plan._replace(inverse=inverse), weights)
    if fault == "mean_not_sum":
        return out / plan.inverse.shape[1]
    if fault == "dropped_slot_reads_row_0":
        inverse = plan.inverse.clamp(min=0)
        return reference.unpermute(y, plan._replace(inverse=inverse), weights)
    if fault == "sum_rounded_at_each_step":
        rows = y[plan.inverse.clamp(min=0).long()] * (plan.inverse >= 0).unsqueeze(-1)
        total = rows[:, 0]
        for j in range(1, rows.shape[1]):
            total = (total + rows[:, j]).bfloat16().to(y.dtype)
        return total
    if fault == "weights_get_no_gradient":
        return reference.unpermute(y, plan, weights.detach() + 0 * weights)
    return out


def grouped_mm(a, b, offsets, *, fault):
    if fault == "b_not_transposed":
        return reference.grouped_mm(a, b.mT, offsets)
    if fault == "weights_of_the_next_expert":
        return reference.grouped_mm(a, b.roll(-1, 0), offsets)
    if fault == "offsets_shifted_by_one_row":
        return reference.grouped_mm(a, b, (offsets + 1).clamp(max=int(offsets[-1])))
    if fault == "last_expert_skipped":
        return reference.grouped_mm(a, b[:-1], offsets[:-1])
    if fault == "tail_computed_with_the_last_expert":
        ends = offsets.clone()
        ends[-1] = a.shape[0]
        return reference.grouped_mm(a, b, ends)
    if fault == "last_column_of_K_lost":
        return reference.grouped_mm(F.pad(a[:, :-1], (0, 1)), b, offsets)
    if fault == "last_column_of_n_lost":
        return F.pad(reference.grouped_mm(a, b, offsets)[:, :-1], (0, 1))
    if fault == "rows_beyond_a_block_of_16_lost":
        out = reference.grouped_mm(a, b, offsets)
        kept = torch.cat([torch.arange(n) % 32 < 16 for n in offsets.diff().tolist()])
        kept = F.pad(kept, (0, a.shape[0] - kept.numel()))
        return torch.where(kept.unsqueeze(1), out, 0.0)
    if fault == "b_gets_no_gradient":
        return reference.grouped_mm(a, b.detach() + 0 * b, offsets)
    return reference.grouped_mm(a, b, offsets)


def expert_mlp(x, routing, gate_up, down, *, fault):
    """(8) with one fault, over all experts at once."""
    M, half = gate_up.shape[0], gate_up.shape[1] // 2
    ids, w = routing.experts, routing.weights
    if fault == "gate_and_up_swapped":
        gate_up = torch.cat([gate_up[:, half:], gate_up[:, :half]], 1)
    if fault == "gate_and_up_interleaved":
        gate_up = torch.cat([gate_up[:, 0::2], gate_up[:, 1::2]], 1)
    if fault == "up_gets_no_gradient":
        gate_up = torch.cat([gate_up[:, :half], gate_up[:, half:].detach()], 1)
    if fault == "weight_not_applied":
        w = w * 0 + 1
    if fault == "weight_applied_twice":
        w = w * w
    if fault == "weight_gets_no_gradient":
        w = w.detach() + 0 * w
    if fault == "second_slot_lost":
        ids = torch.where(torch.arange(ids.shape[1]) == 1, -1, ids)
    if fault == "one_expert_skipped":
        ids = torch.where(ids == 2, -1, ids)
    if fault == "ids_clamped_not_dropped":
        ids = ids.clamp(0, M - 1)
    if fault == "weights_of_expert_0_for_all":
        gate_up = gate_up[:1].expand_as(gate_up)
    plan = reference.dispatch_plan(ids.int(), M)
    z = reference.grouped_mm(reference.permute(x.float(), plan), gate_up.float(), plan.offsets)
    gate, up = z.chunk(2, -1)
    act = {
        "gelu_not_silu": F.gelu,
        "silu_without_its_factor": torch.sigmoid,
        "relu_not_silu": F.relu,
    }.get(fault, F.silu)(gate)
    if fault == "silu_slope_is_sigmoid":
        s = torch.sigmoid(gate.detach())
        act = act.detach() + (gate - gate.detach()) * s
    hidden = act * up
    if fault == "last_column_of_F_lost":
        hidden = F.pad(hidden[:, :-1], (0, 1))
    if fault == "x_gets_no_gradient_through_up":
        detached = reference.permute(x.float().detach(), plan)
        up = reference.grouped_mm(detached, gate_up.float(), plan.offsets).chunk(2, -1)[1]
        hidden = act * up
    rows = reference.grouped_mm(hidden, down.float(), plan.offsets)
    if fault == "weight_missing_in_the_gradient_of_down":
        scale = reference.permute(w.flatten().unsqueeze(1), _slots(plan))
        rows = _gradient_divided(rows, scale)
    return reference.unpermute(rows, plan, w).to(x.dtype)


def _slots(plan: DispatchPlan) -> DispatchPlan:
    """The same rows, with each slot per token of its own."""
    return plan._replace(inverse=plan.inverse.reshape(-1, 1))


def _gradient_divided(rows: Tensor, scale: Tensor) -> Tensor:
    scale = torch.where(scale == 0, 1.0, scale).detach()
    return rows.detach() + (rows - rows.detach()) / scale


FORMULAS = [
    (ROUTER_LOGITS, "square_M", router_logits, "weight_not_transposed"),
    *[
        (ROUTER_LOGITS, "ragged", router_logits, fault)
        for fault in (
            "last_column_of_D_lost",
            "last_expert_of_the_next_block",
            "logits_rounded_to_bfloat16",
            "logits_are_not_widened",
            "x_gets_no_gradient",
        )
    ],
    *[
        (NORM_TOPK, "ragged", norm_topk, fault)
        for fault in (
            "calibration_ignored",
            "scale_ignored",
            "scale_gets_no_gradient",
            "eps_too_large",
            "l1_norm",
            "weights_renormalized",
            "importance_of_the_chosen_only",
            "importance_is_a_mean",
            "importance_gets_no_gradient",
            "weights_get_no_gradient",
            "norm_is_a_constant_in_backward",
            "load_counts_tokens",
            "load_counts_the_first_slot",
            "experts_are_int64",
        )
    ],
    (NORM_TOPK, "ties", norm_topk, "ties_to_the_higher_id"),
    *[
        (NORM_TOPK_STEERED, "M_not_pow2", norm_topk, fault)
        for fault in (
            "mask_counts_in_the_norm",
            "mask_ignored",
            "bias_ignored",
            "bias_leaks_into_weights",
        )
    ],
    (SOFTMAX_TOPK, "ragged", softmax_topk, "softmax_over_the_chosen_only"),
    (SOFTMAX_TOPK, "ragged", softmax_topk, "jacobian_is_diagonal"),
    (SOFTMAX_TOPK, "ragged", softmax_topk, "renormalized"),
    (SOFTMAX_TOPK, "ragged", softmax_topk, "slots_in_id_order"),
    (SOFTMAX_TOPK_RENORMALIZED, "ragged", softmax_topk, "never_renormalized"),
    (SOFTMAX_TOPK_RENORMALIZED, "ragged", softmax_topk, "bias_ignored"),
    (PERMUTE, "ragged", permute, "row_of_the_slot_not_of_the_token"),
    (PERMUTE, "dropped", permute, "tail_is_stale"),
    (PERMUTE, "ragged", permute, "gradient_of_the_first_slot_only"),
    *[
        (UNPERMUTE_WEIGHTED, "dropped", unpermute, fault)
        for fault in (
            "weights_not_applied",
            "weights_of_another_slot",
            "weights_of_another_token",
            "last_slot_only",
            "mean_not_sum",
            "dropped_slot_reads_row_0",
            "weights_get_no_gradient",
        )
    ],
    *[
        (GROUPED_MM, case, grouped_mm, fault)
        for case, fault in (
            ("square", "b_not_transposed"),
            ("ragged", "weights_of_the_next_expert"),
            ("ragged", "offsets_shifted_by_one_row"),
            ("dropped", "last_expert_skipped"),
            ("dropped", "tail_computed_with_the_last_expert"),
            ("ragged", "last_column_of_K_lost"),
            ("ragged", "last_column_of_n_lost"),
            ("dropped", "rows_beyond_a_block_of_16_lost"),
            ("ragged", "b_gets_no_gradient"),
        )
    ],
    *[
        (EXPERT_MLP, "square_dropped", expert_mlp, fault)
        for fault in (
            "gate_and_up_swapped",
            "gate_and_up_interleaved",
            "up_gets_no_gradient",
            "weight_not_applied",
            "weight_applied_twice",
            "weight_gets_no_gradient",
            "second_slot_lost",
            "one_expert_skipped",
            "ids_clamped_not_dropped",
            "weights_of_expert_0_for_all",
            "gelu_not_silu",
            "silu_without_its_factor",
            "relu_not_silu",
            "silu_slope_is_sigmoid",
            "last_column_of_F_lost",
            "x_gets_no_gradient_through_up",
            "weight_missing_in_the_gradient_of_down",
        )
    ],
]


@cache
def problem(spec: OpSpec, case: str, dtype: torch.dtype) -> tuple[dict, dict, dict]:
    """Inputs, right results in the dtype, and the oracle's; never changed in place."""
    inputs = spec.inputs(CASES[case], dtype)
    right = run(spec, CASES[case], reference, inputs)
    return inputs, right, oracle(spec, CASES[case], inputs)


def judge(spec: OpSpec, case: str, dtype: torch.dtype, results: dict) -> None:
    inputs, _, exact = problem(spec, case, dtype)
    check_results(spec, CASES[case], inputs, results, exact, dtype)


def rows(t: Tensor) -> Tensor:
    return t.view(-1, t.shape[-1]) if t.dim() > 1 else t.view(-1, 1)
