# SPDX-License-Identifier: Apache-2.0
"""The window of a pool pass: what a backward may hold before it sums."""

import pytest
import torch

from unipool.nn import ExpertPool, NormRouter, SoftmaxRouter, pooled_moe
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


def run_layers(window: int | None, device: torch.device) -> tuple[list[int], int]:
    """The bytes that each of six layers leaves with its pass, and how often the pass summed."""
    torch.manual_seed(0)
    pool = ExpertPool(4, 16, 24, wgrad_window_bytes=window).to(device)
    router = SoftmaxRouter(16, 4, 2).to(device)  # no silent slots: layers leave equally much
    experts = pool.begin_pass()
    add, left = experts.collector.add, []

    def spy(segment, *rest):
        left.append(sum(t.nbytes for t in segment))
        add(segment, *rest)

    experts.collector.add = spy
    h = torch.randn(40, 16, device=device, requires_grad=True)
    for _ in range(6):
        h = h + pooled_moe(h, router, experts)[0]
    h.square().mean().backward()
    return left, experts.collector.flushes


def test_it_sums_whenever_more_than_the_window_is_held(device):
    """With room for n layers every (n + 1)-th is one too many; the end sums what is left."""
    left, flushes = run_layers(None, device)
    assert (len(left), len(set(left)), flushes) == (6, 1, 0)
    size = left[0]
    for window, due in [
        *((0, 6), (size - 1, 6), (size, 3), (2 * size - 1, 3), (2 * size, 2), (3 * size, 2)),
        *((5 * size, 1), (6 * size - 1, 1), (6 * size, 0)),
    ]:
        assert run_layers(window, device) == (left, due), window
