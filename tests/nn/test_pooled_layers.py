# SPDX-License-Identifier: Apache-2.0
"""Two layers over one pool: a GPU against the CPU, and what only a GPU shows."""

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from unipool.nn import ExpertPool, NormRouter, pooled_moe
from unipool.nn.pool_pass import WEIGHT_GRADS

TOKENS, D_MODEL, D_FF, EXPERTS = 53, 48, 40, 7
WINDOW = 2**26  # bytes; asking a GPU for its free memory is not for a graph capture
# Of the largest gradient of a tensor: sums in another order; a few roundings to bfloat16.
BOUNDS = {torch.float32: 2e-5, torch.bfloat16: 4e-2, torch.float16: 6e-3}


class TwoLayers(nn.Module):
    def __init__(self, top_k: int, weight_grad: str) -> None:
        super().__init__()
        self.pool = ExpertPool(
            EXPERTS, D_MODEL, D_FF, weight_grad=weight_grad, wgrad_window_bytes=WINDOW
        )
        self.routers = nn.ModuleList(NormRouter(D_MODEL, EXPERTS, top_k) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        """Both layers read x: the second one's routing must not hang on a bit of the first one's
        result."""
        pool = self.pool.begin_pass()
        h = F.layer_norm(x, (D_MODEL,))
        return x + sum(pooled_moe(h, layer, pool)[0] for layer in self.routers)


def gradients(model: TwoLayers, x: Tensor) -> dict[str, Tensor]:
    """Of a fixed loss, beside the output. None of the results keeps the graph alive."""
    x = x.detach().requires_grad_()
    y = model(x)
    weight = torch.linspace(-1, 1, y.numel(), device=y.device).view_as(y)
    names, parameters = zip(*model.named_parameters(), strict=True)
    grads = torch.autograd.grad((y.float() * weight).sum(), (x, *parameters))
    return {"y": y.detach(), "x": grads[0], **dict(zip(names, grads[1:], strict=True))}


@pytest.mark.parametrize("weight_grad", WEIGHT_GRADS)
@pytest.mark.parametrize("top_k", [1, 2])
def test_gradients_equal_those_of_the_cpu(top_k, weight_grad, dtype, backend, device):
    if backend.name == "cpu":
        pytest.skip("the CPU is what a GPU is compared with")
    torch.manual_seed(0)
    model = TwoLayers(top_k, weight_grad).to(dtype)
    x = torch.randn(TOKENS, D_MODEL).to(dtype)
    got = gradients(copy.deepcopy(model).to(device), x.to(device))
    if dtype == torch.float16:  # which the CPU has not
        model, x = model.float(), x.float()
    for name, due in gradients(model, x).items():
        error = (got[name].cpu().double() - due.double()).abs().max() / due.double().abs().max()
        assert error < BOUNDS[dtype], f"{name}: {error}"


# --- on a GPU only


@pytest.fixture
def gpu_model():
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    torch.manual_seed(0)
    return TwoLayers(2, "deferred").to("cuda", torch.bfloat16)


def test_cuda_never_waits_for_the_device(gpu_model):
    x = torch.randn(TOKENS, D_MODEL, device="cuda").bfloat16()
    gradients(gpu_model, x)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        gradients(gpu_model, x)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_cuda_graph_of_a_step(gpu_model):
    """Captured with one batch, replayed with another whose routing differs. While a graph lives, so
    do the nodes of the parameters in it, with the stream that they were made on, and a backward
    waits for that stream; a capture may wait for none but its own. So every graph before it must be
    gone, and the warm-up runs on a stream of its own (PyTorch's notes on CUDA graphs)."""
    first, second = (torch.randn(TOKENS, D_MODEL, device="cuda").bfloat16() for _ in range(2))
    due = gradients(gpu_model, second)
    static = first.clone()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        gradients(gpu_model, static)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = gradients(gpu_model, static)
    static.copy_(second)
    graph.replay()
    for name, value in due.items():
        assert torch.equal(captured[name], value), name
