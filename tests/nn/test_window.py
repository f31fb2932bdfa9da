# SPDX-License-Identifier: Apache-2.0
"""The default window of a pool pass: what a backward may hold before it sums."""

import pytest
import torch

from unipool.nn import ExpertPool, NormRouter, pooled_moe
from unipool.nn.pool_pass import default_window_bytes

MIB = 2**20
DEVICES = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])


@pytest.mark.parametrize("device", DEVICES)
def test_a_part_of_what_is_free(device):
    window = default_window_bytes(torch.device(device))
    assert 16 * MIB < window < 2**44


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_memory_that_pytorch_holds_unused_counts_on_cuda():
    device = torch.device("cuda", torch.cuda.current_device())
    torch.cuda.empty_cache()
    before = default_window_bytes(device)
    used = torch.empty(512 * MIB, dtype=torch.uint8, device=device)
    assert default_window_bytes(device) <= before - 100 * MIB
    del used  # PyTorch keeps it: the driver does not call it free
    assert torch.cuda.memory_reserved(device) >= 512 * MIB
    assert abs(default_window_bytes(device) - before) < 16 * MIB


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_later_steps_flush_no_more_than_the_first_on_cuda(monkeypatch):
    """After a step PyTorch holds nearly all memory, and the driver has next to none."""
    pool = ExpertPool(4, 32, 64).cuda()
    routers = [NormRouter(32, 4, 2).cuda() for _ in range(3)]
    x = torch.randn(128, 32, device="cuda")

    def flushes() -> int:
        experts = pool.begin_pass()
        h = x
        for router in routers:
            h = h + pooled_moe(h, router, experts)[0]
        h.square().mean().backward()
        return experts.collector.flushes

    assert flushes() == 0
    held = torch.empty(64 * MIB, dtype=torch.uint8, device="cuda")
    del held
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device=None: (0, 80 * 2**30))
    assert flushes() == 0
