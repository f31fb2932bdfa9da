# SPDX-License-Identifier: Apache-2.0
"""Calls of the raw ops that only a hostile caller makes: refused in one line, or well defined."""

import pytest
import torch

from unipool import ops

T, M, D, F, K = 6, 4, 8, 5, 2


def layer(device: torch.device) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    tensors = {
        "grad": torch.randn(T, D, generator=generator),
        "weights": torch.rand(T, K, generator=generator),
        "gate_up": torch.randn(M, 2 * F, D, generator=generator),
        "down": torch.randn(M, D, F, generator=generator),
    }
    experts = torch.randint(0, M, (T, K), generator=generator, dtype=torch.int32)
    plan = ops.dispatch_plan(experts.to(device), M)
    return {n: t.to(device) for n, t in tensors.items()} | plan._asdict()


@pytest.mark.parametrize("shared", ["grad", "weights", "gate_up", "down"])
def test_a_written_operand_may_not_overlap_another(backend, device, shared):
    i = layer(device)
    memory = torch.zeros(max(T * K * 2 * F, i[shared].numel()) + 3, device=device)
    preact = memory[: T * K * 2 * F].view(T * K, 2 * F)
    i[shared] = memory[3 : 3 + i[shared].numel()].view(i[shared].shape)
    message = f"expert_mlp_bwd_: preact, which is written, must not share memory with {shared}"
    with pytest.raises(ValueError, match=message):
        backend.raw.expert_mlp_bwd_(*i.values(), preact)


@pytest.mark.parametrize("shared", ["order", "inverse", "offsets"])
def test_a_written_operand_may_not_overlap_the_plan(backend, device, shared):
    i = layer(device)
    preact = torch.zeros(T * K, 2 * F, device=device)
    i[shared] = preact.view(torch.int32).flatten()[: i[shared].numel()].view(i[shared].shape)
    with pytest.raises(ValueError, match=f"preact, which is written, .* with {shared}"):
        backend.raw.expert_mlp_bwd_(*i.values(), preact)


@pytest.mark.parametrize("shared", ["grad", "input", "order", "offsets"])
def test_a_sum_may_not_overlap_what_is_added(backend, device, shared):
    i = layer(device)
    total = torch.zeros(M, D, F, device=device)
    given = {
        "grad": i["grad"],
        "input": torch.randn(T * K, F, device=device),
        "order": i["order"],
        "offsets": i["offsets"],
    }
    flat = total.flatten()[: given[shared].numel()]
    given[shared] = flat.view(given[shared].dtype).view(given[shared].shape)
    message = f"grouped_wgrad_: sum, which is written, must not share memory with {shared}"
    with pytest.raises(ValueError, match=message):
        backend.raw.grouped_wgrad_(total, *([t] for t in given.values()), K, 0)


def test_neighbours_in_one_memory_are_no_overlap(backend, device):
    i = layer(device)
    preact = torch.randn(T * K, 2 * F, device=device)
    want = backend.raw.expert_mlp_bwd(*i.values(), preact)
    memory = torch.empty(preact.numel() + T * D, device=device)
    here, grad = memory[: preact.numel()].view(preact.shape), memory[preact.numel() :].view(T, D)
    here.copy_(preact)
    grad.copy_(i["grad"])
    got = backend.raw.expert_mlp_bwd_(*(i | {"grad": grad}).values(), here)
    for a, b in zip((*got[:2], here, got[2]), want, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("top_k", [2**62 + 1, 2**61, 2**33, 2**31])
def test_a_product_that_overflows_is_refused(backend, device, top_k):
    x = torch.zeros(4, D, device=device)
    order = torch.zeros(4, dtype=torch.int32, device=device)
    with pytest.raises(ValueError, match=r"permute: T \* top_k must be below 2\^31, got 4 \* "):
        backend.raw.permute(x, order, top_k)
    offsets = torch.zeros(M + 1, dtype=torch.int32, device=device)
    with pytest.raises(ValueError, match=r"grouped_wgrad: N must be below 2\^31, got 4 \* "):
        backend.raw.grouped_wgrad([x], [x], [order], [offsets], top_k, 0)
    with pytest.raises(ValueError, match=r"grouped_wgrad: N must be below 2\^31, got 4 \* "):
        backend.raw.grouped_wgrad([x], [x], [order], [offsets], 0, top_k)


@pytest.mark.parametrize("op", ["norm_topk", "softmax_topk"])
@pytest.mark.parametrize("byte", [2, 0x80, 0xFF])
def test_every_byte_but_zero_of_a_mask_hides(device, op, byte):
    logits = torch.randn(64, 40, generator=torch.Generator().manual_seed(1)).to(device)
    hidden = torch.arange(40, device=device) % 3 == 0
    mask = (hidden.to(torch.uint8) * byte).view(torch.bool)

    def run(mask: torch.Tensor) -> list[torch.Tensor]:
        z = logits.clone().requires_grad_()
        scale = [torch.ones((), device=device)] if op == "norm_topk" else []
        routing = getattr(ops, op)(z, *scale, 3, mask=mask)
        (routing.weights.sum() + routing.importance.square().sum()).backward()
        return [*routing, z.grad]

    for got, want in zip(run(mask), run(hidden), strict=True):
        assert torch.equal(got, want)
