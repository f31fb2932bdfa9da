# SPDX-License-Identifier: Apache-2.0
"""The launchers of grouped products and of the weight gradient as functions of tensors, beside
those of launchers.py."""

import ctypes
from collections.abc import Sequence
from ctypes import c_bool, c_int, c_int64, c_void_p
from dataclasses import dataclass

import torch
from launchers import AUTO_TILE, DTYPES, Launchers, fresh, on_device, pointer
from torch import Tensor

MAX_WGRAD_SEGMENTS = 128


class GroupedMmArgs(ctypes.Structure):
    _fields_ = [
        *((name, c_void_p) for name in ("a", "b", "offsets", "out")),
        *((name, c_int64) for name in ("rows", "n", "k")),
        *((name, c_int) for name in ("experts", "dtype", "tile")),
    ]


class WgradSegment(ctypes.Structure):
    _fields_ = [
        *((name, c_void_p) for name in ("grad", "input", "order", "offsets")),
        ("rows", c_int64),
    ]


class GroupedWgradArgs(ctypes.Structure):
    _fields_ = [
        ("segments", WgradSegment * MAX_WGRAD_SEGMENTS),
        *((name, c_int) for name in ("count", "grad_top_k", "input_top_k")),
        ("out", c_void_p),
        ("add", c_bool),
        *((name, c_int64) for name in ("n", "k")),
        *((name, c_int) for name in ("experts", "dtype", "out_dtype")),
        ("workspace", c_void_p),
        ("tile", c_int),
    ]


@dataclass(frozen=True)
class Segment:
    """Operands of the rows of one layer; order: see WgradSegment in grouped_wgrad.h."""

    grad: Tensor
    input: Tensor
    order: Tensor | None
    offsets: Tensor
    rows: int

    @property
    def tensors(self) -> list[Tensor | None]:
        return [self.grad, self.input, self.order, self.offsets]


class GemmLaunchers(Launchers):
    """Of the grouped products; `place` is for outputs."""

    @on_device
    def grouped_mm(self, a: Tensor, b: Tensor, offsets: Tensor, tile: int = AUTO_TILE) -> Tensor:
        """a [N, K], b [M, n, K] -> [N, n]"""
        return self._product("grouped_mm", a, b, offsets, b.shape[1], tile)

    @on_device
    def grouped_mm_bwd_a(
        self, grad: Tensor, b: Tensor, offsets: Tensor, tile: int = AUTO_TILE
    ) -> Tensor:
        """grad [N, n], b [M, n, K] -> [N, K]"""
        return self._product("grouped_mm_bwd_a", grad, b, offsets, b.shape[2], tile)

    @on_device
    def grouped_wgrad(
        self,
        segments: Sequence[Segment],
        sizes: tuple[int, int, int],
        *,
        top_k: tuple[int, int] = (0, 0),
        out_dtype: torch.dtype | None = None,
        add_to: Tensor | None = None,
        tile: int = AUTO_TILE,
    ) -> Tensor:
        """sizes: M, n, K; top_k: of grad and of input. Returns [M, n, K]."""
        experts, n, k = sizes
        dtype = segments[0].grad.dtype
        out = add_to
        if out is None:
            out = self.place(fresh(sizes, dtype if out_dtype is None else out_dtype))
        rows, row_bytes = sum(s.rows for s in segments), max(n, k) * dtype.itemsize
        workspace = self.workspace("grouped_wgrad", c_int64(rows), experts, c_int64(row_bytes))
        args = GroupedWgradArgs()
        for i, s in enumerate(segments):
            args.segments[i] = WgradSegment(*map(pointer, s.tensors), s.rows)
        args.count, (args.grad_top_k, args.input_top_k) = len(segments), top_k
        args.out, args.add, args.n, args.k = out.data_ptr(), add_to is not None, n, k
        args.experts, args.dtype = experts, DTYPES.index(dtype)
        args.out_dtype, args.workspace = DTYPES.index(out.dtype), workspace.data_ptr()
        args.tile = tile
        self._launch(
            "grouped_wgrad", args, [*(t for s in segments for t in s.tensors), out, workspace]
        )
        return out

    def _product(
        self, op: str, a: Tensor, b: Tensor, offsets: Tensor, columns: int, tile: int
    ) -> Tensor:
        experts, n, k = b.shape
        out = self.place(fresh((a.shape[0], columns), a.dtype))
        tensors = [a, b, offsets, out]
        pointers = [pointer(t) for t in tensors]
        args = GroupedMmArgs(*pointers, a.shape[0], n, k, experts, DTYPES.index(a.dtype), tile)
        self._launch(op, args, tensors)
        return out
