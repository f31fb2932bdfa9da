# SPDX-License-Identifier: Apache-2.0
"""The launchers of csrc/include/unipool as functions of tensors of the CPU, whose copies on the
device the kernels get. Outputs start as NaN or -7, so an element that a kernel leaves unwritten
shows."""

import ctypes
import dataclasses
import functools
from collections.abc import Callable, Sequence
from ctypes import c_bool, c_float, c_int, c_int32, c_int64, c_void_p

import torch
from kernel_library import Lib
from torch import Tensor

DTYPES = [torch.float32, torch.float16, torch.bfloat16]  # by the value of unipool::DType
MAX_SEGMENTS = 128
AUTO_TILE = -1
TILES = {"t16": 0, "t32": 1, "t64": 2, "t128": 3, "f32": 4}  # by their index in gemm_tiles.h


class RouterArgs(ctypes.Structure):
    _fields_ = [
        *((name, c_void_p) for name in ("logits", "bias", "mask")),
        *((name, c_void_p) for name in ("weights", "experts", "load", "importance", "workspace")),
        ("tokens", c_int64),
        *((name, c_int) for name in ("num_experts", "top_k", "dtype")),
    ]


class RouterBwdArgs(ctypes.Structure):
    _fields_ = [
        *((name, c_void_p) for name in ("grad_weights", "grad_importance", "logits", "experts")),
        *((name, c_void_p) for name in ("mask", "grad_logits", "workspace")),
        ("tokens", c_int64),
        *((name, c_int) for name in ("num_experts", "top_k", "dtype")),
    ]


class NormTopkArgs(ctypes.Structure):
    _fields_ = [
        ("router", RouterArgs),
        ("scale", c_void_p),
        ("calibration", c_float),
        ("eps", c_float),
    ]


class NormTopkBwdArgs(ctypes.Structure):
    _fields_ = [
        ("router", RouterBwdArgs),
        ("scale", c_void_p),
        ("grad_scale", c_void_p),
        ("calibration", c_float),
        ("eps", c_float),
    ]


class SoftmaxTopkArgs(ctypes.Structure):
    _fields_ = [("router", RouterArgs), ("renormalize", c_bool)]


class SoftmaxTopkBwdArgs(ctypes.Structure):
    _fields_ = [("router", RouterBwdArgs), ("renormalize", c_bool)]


class DispatchPlanArgs(ctypes.Structure):
    _fields_ = [
        ("experts", c_void_p * MAX_SEGMENTS),
        ("slots", c_int32 * MAX_SEGMENTS),
        ("segments", c_int),
        ("num_experts", c_int),
        *((name, c_void_p) for name in ("order", "inverse", "offsets", "workspace")),
    ]


class PermuteArgs(ctypes.Structure):
    _fields_ = [
        *((name, c_void_p) for name in ("x", "order", "y")),
        ("rows", c_int64),
        ("row_bytes", c_int64),
        ("top_k", c_int),
    ]


class UnpermuteArgs(ctypes.Structure):
    _fields_ = [
        *((name, c_void_p) for name in ("y", "inverse", "weights", "out")),
        *((name, c_int64) for name in ("tokens", "width")),
        *((name, c_int) for name in ("top_k", "dtype")),
    ]


class UnpermuteBwdArgs(ctypes.Structure):
    _fields_ = [
        *((name, c_void_p) for name in ("grad", "y", "order", "inverse", "weights")),
        *((name, c_void_p) for name in ("grad_y", "grad_weights")),
        *((name, c_int64) for name in ("tokens", "width")),
        *((name, c_int) for name in ("top_k", "dtype")),
    ]


def _moved(value: object, device: str) -> object:
    """Tensors in lists and dataclasses are moved, too; what is misaligned stays it."""
    if isinstance(value, Tensor):
        moved = value.to(device)
        return misaligned(moved) if value.data_ptr() % 16 else moved
    if isinstance(value, list | tuple):
        return type(value)(_moved(v, device) for v in value)
    if dataclasses.is_dataclass(value):
        fields = [f.name for f in dataclasses.fields(value)]
        return type(value)(*(_moved(getattr(value, name), device) for name in fields))
    return value


def on_device(method: Callable) -> Callable:
    """A method that gets its tensors on the device and returns them there; the caller's are the
    CPU's."""

    @functools.wraps(method)
    def run(self, *args, **options):
        options = {name: _moved(value, "cuda") for name, value in options.items()}
        return _moved(method(self, *_moved(args, "cuda"), **options), "cpu")

    return run


class Launchers:
    """Runs the launchers of one library. `place` says where tensors lie: as they come, or
    misaligned."""

    def __init__(self, lib: Lib, place: Callable[[Tensor], Tensor] = lambda t: t) -> None:
        self.lib, self.place = lib, place

    # --- routers

    @on_device
    def norm_topk(
        self,
        logits: Tensor,
        scale: Tensor,
        top_k: int,
        *,
        calibration: float = 1.0,
        eps: float = 1e-8,
        bias: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> list[Tensor]:
        """weights [T, k], experts [T, k], load [M], importance [M]"""
        router, results, tensors = self._router(logits, top_k, bias, mask)
        args = NormTopkArgs(router, scale.data_ptr(), calibration, eps)
        self._launch("norm_topk", args, [*tensors, scale])
        return results

    @on_device
    def softmax_topk(
        self,
        logits: Tensor,
        top_k: int,
        *,
        renormalize: bool = False,
        bias: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> list[Tensor]:
        router, results, tensors = self._router(logits, top_k, bias, mask)
        self._launch("softmax_topk", SoftmaxTopkArgs(router, renormalize), tensors)
        return results

    @on_device
    def norm_topk_bwd(
        self,
        grad_weights: Tensor | None,
        grad_importance: Tensor | None,
        logits: Tensor,
        scale: Tensor,
        experts: Tensor,
        *,
        calibration: float = 1.0,
        eps: float = 1e-8,
        mask: Tensor | None = None,
    ) -> list[Tensor]:
        """grad_logits [T, M], grad_scale [1]"""
        router, grad_logits, tensors = self._router_bwd(
            grad_weights, grad_importance, logits, experts, mask
        )
        grad_scale = fresh((1,), torch.float32)
        args = NormTopkBwdArgs(router, scale.data_ptr(), grad_scale.data_ptr(), calibration, eps)
        self._launch("norm_topk_bwd", args, [*tensors, scale, grad_scale])
        return [grad_logits, grad_scale]

    @on_device
    def softmax_topk_bwd(
        self,
        grad_weights: Tensor | None,
        grad_importance: Tensor | None,
        logits: Tensor,
        experts: Tensor,
        *,
        renormalize: bool = False,
        mask: Tensor | None = None,
    ) -> list[Tensor]:
        router, grad_logits, tensors = self._router_bwd(
            grad_weights, grad_importance, logits, experts, mask
        )
        self._launch("softmax_topk_bwd", SoftmaxTopkBwdArgs(router, renormalize), tensors)
        return [grad_logits]

    def _router(self, logits, top_k, bias, mask):
        tokens, experts = logits.shape
        results = [
            fresh((tokens, top_k), torch.float32),
            fresh((tokens, top_k), torch.int32),
            fresh((experts,), torch.int32),
            fresh((experts,), torch.float32),
        ]
        workspace = self.workspace("router", c_int64(tokens), experts)
        tensors = [logits, bias, mask, *results, workspace]
        pointers = [pointer(t) for t in tensors]
        args = RouterArgs(*pointers, tokens, experts, top_k, DTYPES.index(logits.dtype))
        return args, results, tensors

    def _router_bwd(self, grad_weights, grad_importance, logits, experts, mask):
        tokens, num_experts = logits.shape
        grad_logits = fresh(logits.shape, logits.dtype)
        if logits.data_ptr() % 16:  # misaligned as its logits are
            grad_logits = misaligned(grad_logits)
        workspace = self.workspace("router_bwd", c_int64(tokens))
        tensors = [grad_weights, grad_importance, logits, experts, mask, grad_logits, workspace]
        dtype = DTYPES.index(logits.dtype)
        pointers = [pointer(t) for t in tensors]
        args = RouterBwdArgs(*pointers, tokens, num_experts, experts.shape[1], dtype)
        return args, grad_logits, tensors

    # --- dispatch

    @on_device
    def dispatch_plan(self, experts: Sequence[Tensor], num_experts: int) -> list[Tensor]:
        """order [N], inverse [N], offsets [M + 1]"""
        slots = sum(e.numel() for e in experts)
        results = [fresh((n,), torch.int32) for n in (slots, slots, num_experts + 1)]
        workspace = self.workspace("dispatch_plan", c_int64(slots), num_experts)
        args = DispatchPlanArgs()
        for i, e in enumerate(experts):
            args.experts[i], args.slots[i] = e.data_ptr(), e.numel()
        args.segments, args.num_experts = len(experts), num_experts
        args.order, args.inverse, args.offsets = (t.data_ptr() for t in results)
        args.workspace = workspace.data_ptr()
        self._launch("dispatch_plan", args, [*experts, *results, workspace])
        return results

    @on_device
    def permute(self, x: Tensor, order: Tensor, top_k: int) -> list[Tensor]:
        y = fresh((order.numel(), x.shape[1]), x.dtype)
        row_bytes = x.shape[1] * x.element_size()
        pointers = [pointer(t) for t in (x, order, y)]
        self._launch(
            "permute", PermuteArgs(*pointers, order.numel(), row_bytes, top_k), [x, order, y]
        )
        return [y]

    @on_device
    def unpermute(self, y: Tensor, inverse: Tensor, weights: Tensor | None) -> list[Tensor]:
        """inverse [T, k]"""
        tokens, top_k = inverse.shape
        out = fresh((tokens, y.shape[1]), y.dtype)
        tensors = [y, inverse, weights, out]
        pointers = [pointer(t) for t in tensors]
        dtype = DTYPES.index(y.dtype)
        args = UnpermuteArgs(*pointers, tokens, y.shape[1], top_k, dtype)
        self._launch("unpermute", args, tensors)
        return [out]

    @on_device
    def unpermute_bwd(
        self, grad: Tensor, y: Tensor, order: Tensor, inverse: Tensor, weights: Tensor
    ) -> list[Tensor]:
        """grad_y [N, D], grad_weights [T, k]"""
        tokens, top_k = inverse.shape
        results = [fresh(y.shape, y.dtype), fresh(weights.shape, weights.dtype)]
        tensors = [grad, y, order, inverse, weights, *results]
        pointers = [pointer(t) for t in tensors]
        dtype = DTYPES.index(y.dtype)
        args = UnpermuteBwdArgs(*pointers, tokens, y.shape[1], top_k, dtype)
        self._launch("unpermute_bwd", args, tensors)
        return results

    # --- calls

    def workspace(self, op: str, *sizes: object) -> Tensor:
        """With a margin on both sides that belongs to no tensor: a step beside it is seen."""
        size = self.lib.workspace_bytes(op, *sizes)
        return _full((size + 2 * MARGIN,), torch.uint8, 255)[MARGIN : MARGIN + size]

    def _launch(self, op: str, args: ctypes.Structure, tensors: Sequence[Tensor | None]) -> None:
        self.lib.call(op, args, [t for t in tensors if t is not None])


MARGIN = 4096  # bytes, a multiple of all alignments


def pointer(t: Tensor | None) -> int | None:
    return None if t is None else t.data_ptr()


def fresh(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    return _full(shape, dtype, float("nan") if dtype.is_floating_point else -7)


def _full(shape: Sequence[int], dtype: torch.dtype, value: float) -> Tensor:
    return torch.full(tuple(shape), value, dtype=dtype, device="cuda")


def misaligned(t: Tensor) -> Tensor:
    """The same values, contiguous, one element behind an aligned address."""
    moved = torch.empty(t.numel() + 1, dtype=t.dtype, device=t.device)[1:].view(t.shape)
    return moved.copy_(t)
