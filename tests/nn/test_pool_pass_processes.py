# SPDX-License-Identifier: Apache-2.0
"""The pool pass in a whole model and under DistributedDataParallel."""

import contextlib
import queue
from pathlib import Path

import devices
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from pool_stacks import MERGED, Stack, assert_equal, expected, inputs, loss_of
from torch.nn.parallel import DistributedDataParallel

pytestmark = pytest.mark.usefixtures("device")


_OUTLIVES_ITS_GROUP: list = []  # see the fixture of this name in conftest.py


def _worker(rank: int, world: int, store: Path, mode: str, device: str, results: mp.Queue) -> None:
    devices.select(torch.device(device))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    try:
        model = DistributedDataParallel(Stack(mode))
        _OUTLIVES_ITS_GROUP.append(model)
        loss_of(model(inputs(2 + rank))).backward()
        if rank == 0:
            results.put({name: p.grad.cpu().numpy() for name, p in model.module.named_parameters()})
        dist.barrier()
    finally:
        dist.destroy_process_group()


def _first_result(results: mp.Queue, workers: list) -> dict:
    """What the first worker leaves; no waiting for workers that have died."""
    while all(worker.exitcode in (None, 0) for worker in workers):
        with contextlib.suppress(queue.Empty):
            return results.get(timeout=1)
    raise AssertionError("a worker died")


@pytest.mark.parametrize("mode", MERGED)
def test_distributed_data_parallel_averages_the_gradients(mode, tmp_path):
    context = mp.get_context("spawn")
    results = context.Queue()
    arguments = (2, tmp_path / "store", mode, devices.current().type, results)
    workers = [
        context.Process(target=_worker, args=(rank, *arguments), daemon=True) for rank in range(2)
    ]
    for worker in workers:
        worker.start()
    got = {
        name: torch.from_numpy(g).to(devices.current())
        for name, g in _first_result(results, workers).items()
    }
    for worker in workers:
        worker.join()
        assert worker.exitcode == 0
    assert_equal(got, {name: g / 2 for name, g in expected(2).items()})


@pytest.mark.parametrize("mode", MERGED)
def test_model_trains_as_with_autograd(mode):
    """Thirty steps of a small language model: the loss curves agree to float32 noise."""
    models = pytest.importorskip("unipool.models")
    curves = {}
    for way in (mode, "autograd"):
        torch.manual_seed(0)
        config = models.preset("tiny", "unipool", weight_grad=way)
        model = models.UniPoolForCausalLM(config).to(devices.current()).train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        curves[way] = []
        for step in range(30):
            generator = torch.Generator().manual_seed(step % 4)
            ids = torch.randint(0, 64, (2, 33), generator=generator).to(devices.current())
            loss = model(input_ids=ids, labels=ids).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            curves[way].append(loss.item())
    assert curves[mode][-1] < 0.8 * curves[mode][0]
    torch.testing.assert_close(curves[mode], curves["autograd"], rtol=1e-4, atol=0)
