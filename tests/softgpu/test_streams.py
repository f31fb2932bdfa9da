# SPDX-License-Identifier: Apache-2.0
"""The order of streams: work that two streams leave unordered, and the pool pass, whose weight
gradients read what layers on other streams wrote."""

import re

import planted
import pytest
import softgpu_ops
import torch
from planted import Planted

from unipool.nn import ExpertPool, NormRouter, pooled_moe

if softgpu_ops.softgpu:
    import softgpu

pytestmark = planted.needs_softgpu


@pytest.fixture
def streams() -> tuple[torch.cuda.Stream, torch.cuda.Stream]:
    torch.cuda.synchronize()
    return torch.cuda.Stream(), torch.cuda.Stream()


N = 1000


def memory() -> torch.Tensor:
    """Made before the streams begin."""
    t = torch.zeros(N, dtype=torch.int32, device="cuda")
    torch.cuda.synchronize()
    return t


def launch(kernels: Planted, stream: torch.cuda.Stream, name: str, *args: object) -> None:
    with torch.cuda.stream(stream):
        assert kernels.launch(name, *args, grid=(-(-N // 32), 1, 1)) == "cudaSuccess"


def write(kernels: Planted, stream: torch.cuda.Stream, t: torch.Tensor) -> None:
    launch(kernels, stream, "fill", t, N, 7)


def read(kernels: Planted, stream: torch.cuda.Stream, t: torch.Tensor) -> None:
    with torch.cuda.stream(stream):
        to = torch.empty_like(t)
    launch(kernels, stream, "copy", t, to, N)


# --- planted: a missing order is one line that names both, any order is silence


def test_a_read_that_does_not_wait_for_the_write(kernels, streams, capfd):
    a, b = streams
    with softgpu.races() as found:
        t = memory()
        write(kernels, a, t)
        read(kernels, b, t)
    first, second = (f"(device 0, stream {softgpu.number(s)})" for s in streams)
    assert len(found) == 1
    said, _, place = found[0].partition(": byte ")
    assert said == (
        f"copy(int const*, int*, int) {second} reads what fill(int*, int, int) {first} wrote, and "
        "nothing orders them"
    )
    assert re.match(r"\d+ of an allocation of \d+ on device 0", place)
    lines = [s for s in capfd.readouterr().err.splitlines() if s.startswith("softgpu: ")]
    assert lines == [f"softgpu: race of streams: {found[0]}"]


@pytest.mark.parametrize(
    ("first", "second", "words"),
    [(write, write, "writes what"), (read, write, "writes what"), (write, read, "reads what")],
)
def test_two_accesses_with_a_write(kernels, streams, first, second, words):
    with softgpu.races() as found:
        t = memory()
        first(kernels, streams[0], t)
        second(kernels, streams[1], t)
    assert len(found) == 1
    assert words in found[0]


def test_two_reads_race_never(kernels, streams):
    with softgpu.races() as found:
        t = memory()
        for stream in streams:
            read(kernels, stream, t)
    assert found == []


def test_two_parts_of_a_tensor(kernels, streams):
    a, b = streams
    with softgpu.races() as found:
        t = memory()
        launch(kernels, a, "fill", t, N // 2, 7)
        launch(kernels, b, "fill", t[N // 2 :], N - N // 2, 7)
    assert found == []
    with softgpu.races() as found:
        launch(kernels, a, "fill", t, N // 2 + 1, 7)
        launch(kernels, b, "fill", t[N // 2 :], N - N // 2, 7)
    assert len(found) == 1


def wait_stream(a: torch.cuda.Stream, b: torch.cuda.Stream) -> None:
    b.wait_stream(a)


def wait_through_another(a: torch.cuda.Stream, b: torch.cuda.Stream) -> None:
    other = torch.cuda.Stream()
    other.wait_stream(a)
    b.wait_stream(other)


def wait_on_the_host(a: torch.cuda.Stream, b: torch.cuda.Stream) -> None:
    a.synchronize()


def wait_for_an_event_on_the_host(a: torch.cuda.Stream, b: torch.cuda.Stream) -> None:
    event = a.record_event()
    event.synchronize()


def wait_for_the_device(a: torch.cuda.Stream, b: torch.cuda.Stream) -> None:
    torch.cuda.synchronize()


@pytest.mark.parametrize(
    "order",
    [
        wait_stream,
        wait_through_another,
        wait_on_the_host,
        wait_for_an_event_on_the_host,
        wait_for_the_device,
    ],
)
def test_an_order_is_known(kernels, streams, order):
    with softgpu.races() as found:
        t = memory()
        write(kernels, streams[0], t)
        order(*streams)
        read(kernels, streams[1], t)
    assert found == []


def test_an_event_orders_what_came_before_it_only(kernels, streams):
    a, b = streams
    with softgpu.races() as found:
        early, late = memory(), memory()
        write(kernels, a, early)
        event = a.record_event()
        write(kernels, a, late)
        b.wait_event(event)
        read(kernels, b, early)
        assert softgpu.runtime().softgpu_races() == b""
        read(kernels, b, late)
    assert len(found) == 1


def test_the_wrong_direction(kernels, streams):
    a, b = streams
    with softgpu.races() as found:
        t = memory()
        write(kernels, a, t)
        a.wait_stream(b)
        read(kernels, b, t)
    assert len(found) == 1


def test_torchs_own_operations(streams):
    a, b = streams
    with softgpu.races() as found:
        t = memory()
        with torch.cuda.stream(a):
            t.add_(1)
        with torch.cuda.stream(b):
            t.sum()
    assert len(found) == 1
    assert found[0].startswith("sum")
    assert "what add_.Tensor" in found[0]


def test_a_copy_to_the_host(streams):
    a, b = streams
    host = torch.empty(N, dtype=torch.int32).pin_memory()
    with softgpu.races() as found:
        t = memory()
        with torch.cuda.stream(a):
            t.add_(1)
        with torch.cuda.stream(b):
            host.copy_(t, non_blocking=True)
    assert len(found) == 1
    assert found[0].startswith("cudaMemcpyAsync")


def test_memory_that_is_given_away_while_another_stream_reads_it(kernels, streams):
    """What record_stream is for: to torch's allocator memory is of the stream that asked for it."""
    a, b = streams

    def reuse(record: bool) -> list[str]:
        torch.cuda.empty_cache()
        with softgpu.races() as found:
            with torch.cuda.stream(a):
                t = torch.zeros(N, dtype=torch.int32, device="cuda")
            b.wait_stream(a)
            read(kernels, b, t)
            if record:
                t.record_stream(b)
            address = t.data_ptr()
            del t
            with torch.cuda.stream(a):
                again = torch.ones(N, dtype=torch.int32, device="cuda")
            assert record or again.data_ptr() == address
        return found

    assert len(reuse(record=False)) == 1
    assert reuse(record=True) == []


@pytest.mark.parametrize("joined", [True, False])
def test_branches_of_a_graph(kernels, joined):
    """Two branches that write the same, in a replay."""
    t = memory()
    main, side = torch.cuda.Stream(), torch.cuda.Stream()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=main):
        if joined:
            write(kernels, main, t)
        side.wait_stream(main)
        if not joined:
            write(kernels, main, t)
        write(kernels, side, t)
        main.wait_stream(side)
    with softgpu.races() as found:
        graph.replay()
        read(kernels, torch.cuda.current_stream(), t)
        graph.replay()
    assert len(found) == (not joined)


def test_the_check_costs_nothing_while_it_is_off(kernels, streams, capfd):
    t = memory()
    write(kernels, streams[0], t)
    read(kernels, streams[1], t)
    assert "race" not in capfd.readouterr().err


# --- the pool pass


def loss(pool: ExpertPool, routers: list[NormRouter], x: torch.Tensor, aside: bool) -> torch.Tensor:
    """Of a pass with a layer for each router; aside: each layer on a stream of its own."""
    main, results = torch.cuda.current_stream(), []
    scope = pool.begin_pass()
    for router in routers:
        stream = torch.cuda.Stream() if aside else main
        stream.wait_stream(main)
        with torch.cuda.stream(stream):
            results.append(pooled_moe(x, router, scope)[0])
        main.wait_stream(stream)
        results[-1].record_stream(main)
    return sum(results).sum()


@pytest.mark.filterwarnings("ignore:The AccumulateGrad node")  # the weights are of the main stream
@pytest.mark.parametrize("mode", ["deferred", "accumulate", "autograd"])
@pytest.mark.parametrize("layers", [2, 3])
def test_weight_gradients_wait_for_layers_on_side_streams(mode, layers):
    """Autograd orders what it passes on. The operands of the weight gradients are left with the
    pass instead, by layers whose backward runs on the streams of their forward. (The gradient of x
    would make the main stream wait for the layers, maybe in time.)"""
    window = 0 if mode == "accumulate" else 2**26
    pool = ExpertPool(4, 64, 32, weight_grad=mode, wgrad_window_bytes=window).cuda()
    routers = [NormRouter(64, 4, 2).cuda() for _ in range(layers)]
    x = torch.randn(64, 64, device="cuda")
    loss(pool, routers, x, aside=False).backward()
    due = [p.grad.clone() for p in pool.parameters()]
    pool.zero_grad()
    total = loss(pool, routers, x, aside=True)
    torch.cuda.synchronize()
    with softgpu.races() as found:
        total.backward()
        torch.cuda.synchronize()
    assert found == []
    for p, want in zip(pool.parameters(), due, strict=True):
        torch.testing.assert_close(p.grad, want)
