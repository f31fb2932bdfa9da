# SPDX-License-Identifier: Apache-2.0
"""torch's own operations on the software GPU: CUDA's semantics, as far as they are kept."""

import planted
import pytest
import softgpu_ops
import torch

if softgpu_ops.softgpu:
    import softgpu

pytestmark = planted.needs_softgpu


def draws() -> list[torch.Tensor]:
    return [torch.randn(100, device="cuda"), torch.rand(7, device="cuda")]


def test_random_numbers_follow_the_seed():
    torch.manual_seed(5)
    first, second = draws(), draws()
    assert not torch.equal(first[0], second[0])
    torch.manual_seed(5)
    torch.testing.assert_close(draws(), first, rtol=0, atol=0)
    torch.manual_seed(6)
    assert not torch.equal(draws()[0], first[0])


def test_random_numbers_follow_the_state_of_the_generator():
    draws()
    state = torch.cuda.get_rng_state()
    first = draws()
    torch.cuda.set_rng_state(state)
    torch.testing.assert_close(draws(), first, rtol=0, atol=0)


def test_a_generator_of_its_own_draws_for_itself():
    torch.manual_seed(5)
    first = draws()
    torch.manual_seed(5)
    own = torch.Generator("cuda").manual_seed(9)
    torch.randn(3, device="cuda", generator=own)
    torch.testing.assert_close(draws(), first, rtol=0, atol=0)


def test_results_are_device_memory():
    x = torch.ones(3, device="cuda")
    y = x + 1
    assert y.is_cuda
    assert y.device == x.device
    attributes = torch.cuda.memory_allocated()
    z = torch.empty(1 << 20, device="cuda").mul_(2)
    assert torch.cuda.memory_allocated() - attributes >= z.nbytes


def test_arguments_are_written_in_place():
    x = torch.arange(6.0, device="cuda")
    view = x[::2]
    assert view.add_(1) is view
    assert x.tolist() == [1, 1, 3, 3, 5, 5]
    out = torch.empty(0, device="cuda")
    assert torch.add(x, x, out=out) is out
    assert out.tolist() == [2, 2, 6, 6, 10, 10]


def test_tensors_of_host_and_device_do_not_mix():
    x = torch.ones(3, device="cuda")
    with pytest.raises(RuntimeError, match=r"cuda.*cpu"):
        x + torch.ones(3)
    assert (x + torch.tensor(2.0)).tolist() == [3, 3, 3], "a number may be the host's"


def waits(block) -> bool:
    with softgpu.calls() as calls:
        block()
    return any(c["call"] == "stream_synchronize" for c in calls)


def test_the_host_waits_where_a_size_depends_on_values():
    x = torch.tensor([0.0, 1.0, 2.0], device="cuda")
    index = torch.tensor([0, 2], device="cuda")
    assert waits(x.nonzero)
    assert waits(lambda: x[x > 0])
    assert waits(x.sum().item)
    assert not waits(lambda: x[index])
    assert not waits(lambda: x.masked_fill(x > 0, 3.0).softmax(0).cumsum(0))


def test_captured_operations_run_when_the_graph_does():
    x, total = torch.ones(4, device="cuda"), torch.zeros(1, device="cuda")
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = x * 2
        total += y.sum()
    assert total.item() == 0
    graph.replay()
    assert total.item() == 8
    x.fill_(5)
    graph.replay()
    assert total.item() == 48
    assert y.tolist() == [10] * 4


def test_attention_is_made_of_operations_that_the_cpu_has():
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 3, 8, 16, device="cuda", requires_grad=True) for _ in "qkv")
    y = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    y.sum().backward()
    due = torch.nn.functional.scaled_dot_product_attention(
        q.cpu(), k.cpu(), v.cpu(), is_causal=True
    )
    torch.testing.assert_close(y.cpu(), due)
    assert q.grad.abs().sum() > 0


def test_a_function_of_a_library_that_is_not_there_is_an_error_by_name(capfd):
    """Peer access, of the runtime's own; NVIDIA's other libraries are empty."""
    runtime = softgpu.runtime()
    assert runtime.cudaDeviceEnablePeerAccess(0, 0) != 0
    runtime.cudaGetLastError()
    line = "softgpu: cudaErrorNotSupported: the software GPU does not provide "
    assert capfd.readouterr().err == f"{line}cudaDeviceEnablePeerAccess\n"
