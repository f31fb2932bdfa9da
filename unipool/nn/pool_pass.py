# SPDX-License-Identifier: Apache-2.0
"""One weight gradient for all layers that share a pool.

With plain autograd every layer's backward returns a dense gradient of the whole pool, and autograd
adds L of them, in the parameters' precision. A pass puts one autograd node between the parameters
and the layers instead: layers return no weight gradient but leave its operands (or its sum) with
the pass, and the node, which autograd runs once after all of them, returns the gradient of the
pass. AccumulateGrad, hooks of DDP and FSDP, gradient scaling and clipping see nothing unusual.
"""

import contextlib
import os

import torch
from torch import Tensor

from unipool.ops import Routing
from unipool.ops.arguments import acc_dtype
from unipool.ops.expert_mlp import pooled_expert_mlp
from unipool.ops.first_order import first_order
from unipool.ops.grouped_wgrad import WeightGradSegment

WEIGHT_GRADS = ("deferred", "accumulate", "autograd")
_ops = torch.ops.unipool


def default_window_bytes(device: torch.device) -> int:
    """A quarter of the memory that is free on the device now, or that PyTorch holds unused."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return (torch.cuda.mem_get_info(device)[0] + unused) // 4
    # macOS tells only what there is in all; others nothing.
    for pages, part in (("SC_AVPHYS_PAGES", 4), ("SC_PHYS_PAGES", 8)):
        with contextlib.suppress(AttributeError, ValueError, OSError):
            return os.sysconf(pages) * os.sysconf("SC_PAGE_SIZE") // part
    return 1 << 30


class _Ready:
    """The point in a stream's work from which on tensors may be read, by any stream that waits.

    Autograd orders the streams of two nodes by the gradients that pass between them; the layers of
    a pass hand it none, so the pass has to. Nothing to do off CUDA, and on one stream.
    """

    def __init__(self, device: torch.device) -> None:
        self.stream = torch.cuda.current_stream(device) if device.type == "cuda" else None
        self.event = None if self.stream is None else self.stream.record_event()

    def wait(self, *tensors: Tensor | None) -> None:
        """Orders the current stream after the point, and the tensors' release after its work."""
        if self.stream is None:
            return
        current = torch.cuda.current_stream(self.stream.device)
        if current == self.stream:
            return
        current.wait_event(self.event)
        for tensor in tensors:
            if tensor is not None:
                tensor.record_stream(current)


class _Sums:
    """The gradients of one run of the backward: what is held, and what was summed already."""

    def __init__(self) -> None:
        self.segments: list[tuple[WeightGradSegment, _Ready]] = []
        self.held_bytes = 0
        self.top_k = 0  # of the segments that are held
        self.gate_up: Tensor | None = None  # [M, 2F, D] acc
        self.down: Tensor | None = None  # [M, D, F] acc
        self.ready: _Ready | None = None  # gate_up and down
        self.origins: list[Tensor] = []  # under create_graph: what the gradients depend on

    def hold(self, segment: WeightGradSegment) -> None:
        self.segments.append((segment, _Ready(segment.x.device)))
        self.held_bytes += sum(t.nbytes for t in segment)

    def wait(self) -> list[WeightGradSegment]:
        """Orders the current stream after all that is held and summed; what is held."""
        if self.ready is not None:
            self.ready.wait(self.gate_up, self.down)
        for segment, ready in self.segments:
            ready.wait(*segment)
        return [segment for segment, _ in self.segments]

    def summed(self, device: torch.device) -> None:
        """What was held is part of the sums now."""
        self.segments, self.held_bytes = [], 0
        self.ready = _Ready(device)


class GradientCollector:
    """Collects the layers' segments of a pass, and turns them into the pool's gradients.

    Keyed by the engine's graph task: a backward that an exception cut short leaves nothing behind
    for the next one, and reentrant checkpointing, which runs a backward per segment, works.
    """

    def __init__(self, window_bytes: int) -> None:
        self.window_bytes = window_bytes
        self.sums: dict[int, _Sums] = {}
        self.flushes = 0

    def add(
        self,
        segment: WeightGradSegment,
        top_k: int,
        needs: tuple[bool, bool],
        origins: tuple[Tensor, ...] = (),
    ) -> None:
        """Called by a layer's backward; needs says which of (gate_up, down) want a gradient, and
        origins, under create_graph, what these gradients depend on."""
        sums = self.sums.setdefault(torch._C._current_graph_task_id(), _Sums())
        sums.origins.extend(origins)
        if sums.segments and sums.top_k != top_k:
            self._flush(sums, needs)
        sums.top_k = top_k
        sums.hold(segment)
        if sums.held_bytes > self.window_bytes:
            self._flush(sums, needs)

    def origins(self) -> list[Tensor]:
        """What the gradients that `take` will give depend on; empty but under create_graph."""
        sums = self.sums.get(torch._C._current_graph_task_id())
        return [] if sums is None else sums.origins

    def take(
        self, needs: tuple[bool, bool], dtypes: tuple[torch.dtype, torch.dtype]
    ) -> tuple[Tensor | None, Tensor | None]:
        """The gradients of (gate_up, down) in dtypes; None where no layer left anything."""
        sums = self.sums.pop(torch._C._current_graph_task_id(), None)
        if sums is None:
            return None, None
        if sums.ready is not None:  # something was summed before
            if sums.segments:
                self._flush(sums, needs)
            sums.wait()
            gate_up, down = sums.gate_up, sums.down
        else:
            segments = sums.wait()
            gate_up, down = (
                self._wgrad(segments, sums.top_k, weight, dtype) if needed else None
                for weight, needed, dtype in zip(("gate_up", "down"), needs, dtypes, strict=True)
            )
        return (
            None if gate_up is None else gate_up.to(dtypes[0]),
            None if down is None else down.to(dtypes[1]),
        )

    @staticmethod
    def _operands(segments: list[WeightGradSegment], top_k: int, weight: str) -> tuple:
        order, offsets = [s.order for s in segments], [s.offsets for s in segments]
        if weight == "gate_up":
            grad, value = [s.grad_preact for s in segments], [s.x for s in segments]
            return grad, value, order, offsets, 0, top_k
        grad, value = [s.grad for s in segments], [s.hidden for s in segments]
        return grad, value, order, offsets, top_k, 0

    def _wgrad(
        self, segments: list[WeightGradSegment], top_k: int, weight: str, dtype: torch.dtype
    ) -> Tensor:
        operands = self._operands(segments, top_k, weight)
        computed = operands[0][0].dtype
        return _ops.grouped_wgrad(*operands, computed if dtype == computed else acc_dtype(computed))

    def _flush(self, sums: _Sums, needs: tuple[bool, bool]) -> None:
        segments = sums.wait()
        for weight, needed in zip(("gate_up", "down"), needs, strict=True):
            if not needed:
                continue
            operands = self._operands(segments, sums.top_k, weight)
            total = getattr(sums, weight)
            if total is None:
                total = _ops.grouped_wgrad(*operands, acc_dtype(operands[0][0].dtype))
                setattr(sums, weight, total)
            else:
                _ops.grouped_wgrad_(total, *operands)
        sums.summed(segments[0].x.device)
        self.flushes += 1


class PoolEntry(torch.autograd.Function):
    """The node between the pool's parameters and the layers of a pass."""

    @staticmethod
    def forward(ctx, gate_up, down, collector, dtype, own):
        ctx.set_materialize_grads(False)
        ctx.collector = collector
        ctx.dtypes = (gate_up.dtype, down.dtype)
        outputs = tuple(
            weight.to(dtype, copy=own) if own or weight.dtype != dtype else weight.view_as(weight)
            for weight in (gate_up, down)
        )
        frozen = [
            out for out, need in zip(outputs, ctx.needs_input_grad[:2], strict=True) if not need
        ]
        ctx.mark_non_differentiable(*frozen)
        return outputs

    @staticmethod
    @first_order
    def backward(ctx, *direct):
        ctx.origins = ctx.collector.origins()
        collected = ctx.collector.take(ctx.needs_input_grad[:2], ctx.dtypes)
        grads = []
        # direct: from uses of the weights that are not layers of ours, e.g. a penalty on them.
        for ours, other, dtype in zip(collected, direct, ctx.dtypes, strict=True):
            other = None if other is None else other.to(dtype)
            grads.append(other if ours is None else ours if other is None else ours + other)
        return *grads, None, None, None


class PoolPass:
    """A pool in one forward pass of the model; layers call it in the pool's place.

    Attributes:
        gate_up: [M, 2F, D], in the dtype of the computation.
        down: [M, D, F], in the same.
        collector: where layers leave their weight gradients; None in mode "autograd".

    own: copy the weights, as whoever owns the parameters frees them before the layers are run.
    """

    def __init__(
        self,
        gate_up: Tensor,
        down: Tensor,
        weight_grad: str,
        window_bytes: int | None,
        own: bool = False,
    ) -> None:
        self.num_experts = gate_up.shape[0]
        self.gate_up, self.down = gate_up, down
        self.collector: GradientCollector | None = None
        needed = torch.is_grad_enabled() and (gate_up.requires_grad or down.requires_grad)
        if weight_grad == "autograd" or not needed or torch.compiler.is_compiling():
            if own:
                self.gate_up, self.down = gate_up.clone(), down.clone()
            return
        if weight_grad == "accumulate":
            window_bytes = 0
        elif window_bytes is None:
            window_bytes = default_window_bytes(gate_up.device)
        self.collector = GradientCollector(window_bytes)
        device = gate_up.device.type
        dtype = gate_up.dtype
        if torch.is_autocast_enabled(device):  # once for all layers
            dtype = torch.get_autocast_dtype(device)
        self.gate_up, self.down = PoolEntry.apply(gate_up, down, self.collector, dtype, own)

    def __call__(self, x: Tensor, routing: Routing) -> Tensor:
        """x [T, D] and its Routing -> [T, D], the weighted sum of each token's experts."""
        if routing.load.shape[0] != self.num_experts:
            raise ValueError(
                f"ExpertPool: routing must be over the pool's {self.num_experts} experts, "
                f"got {routing.load.shape[0]}"
            )
        return pooled_expert_mlp(x, routing, self.gate_up, self.down, self.collector)
