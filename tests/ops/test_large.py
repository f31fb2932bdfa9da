# SPDX-License-Identifier: Apache-2.0
"""Sizes that only a GPU does in reasonable time: more than 2^24 slots, more than 2^31 elements."""

import devices
import pytest
import torch

from unipool import ops

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
    pytest.mark.skipif(devices.software_gpu(), reason="hours on the software GPU"),
]


def test_cuda_dispatch_plan_beyond_2_to_the_24_slots():
    experts = torch.randint(-1, 384, (2**25 + 3, 1), dtype=torch.int32, device="cuda")
    plan = ops.dispatch_plan(experts, 384)
    flat = experts.flatten().long()
    key = torch.where(flat < 0, 384, flat)
    wanted = key.argsort(stable=True)
    rows = int(plan.offsets[-1])
    assert rows == int((flat >= 0).sum())
    assert torch.equal(plan.order[:rows].long(), wanted[:rows])
    assert (plan.order[rows:] == -1).all()
    counts = key.bincount(minlength=385)[:384]
    assert torch.equal(plan.offsets.diff().long(), counts)


def test_cuda_permute_and_unpermute_beyond_2_to_the_31_elements():
    tokens, width = 2**20 + 1, 2**11 + 8
    x = torch.randint(-4, 5, (tokens, width), device="cuda").to(torch.bfloat16)
    experts = torch.randint(0, 96, (tokens, 1), dtype=torch.int32, device="cuda")
    plan = ops.dispatch_plan(experts, 96)
    y = ops.permute(x, plan)
    for row in (0, tokens // 2, tokens - 1):
        assert torch.equal(y[row], x[int(plan.order[row])])
    assert torch.equal(ops.unpermute(y, plan), x)
