# SPDX-License-Identifier: Apache-2.0
"""The launchers of the expert MLP as functions of tensors, beside those of launchers.py."""

import ctypes
from collections.abc import Sequence
from ctypes import c_int, c_int64, c_void_p
from dataclasses import dataclass

import torch
from launchers import AUTO_TILE, DTYPES, Launchers, fresh, on_device, pointer
from torch import Tensor


def _fields(*pointers: str) -> list[tuple[str, type]]:
    return [
        *((name, c_void_p) for name in pointers),
        *((name, c_int64) for name in ("rows", "d_model", "d_ff")),
        *((name, c_int) for name in ("experts", "top_k", "dtype", "tile")),
    ]


class ExpertUpArgs(ctypes.Structure):
    _fields_ = _fields("x", "gate_up", "order", "offsets", "preact", "hidden")


class ExpertDownArgs(ctypes.Structure):
    _fields_ = _fields("hidden", "down", "weights", "order", "inverse", "offsets", "out")


class ExpertHiddenBwdArgs(ctypes.Structure):
    _fields_ = _fields(
        *("grad", "down", "weights", "order", "inverse", "offsets", "preact"),
        *("grad_preact", "hidden", "grad_weights", "workspace"),
    )


class ExpertInputBwdArgs(ctypes.Structure):
    _fields_ = _fields("grad_preact", "gate_up", "order", "inverse", "offsets", "out")


@dataclass(frozen=True)
class Layer:
    """What all products of one layer share; sorted rows are those of its plan."""

    gate_up: Tensor  # [M, 2F, D]
    down: Tensor  # [M, D, F]
    weights: Tensor  # [T, k] float32
    order: Tensor  # [N]
    inverse: Tensor  # [T, k]
    offsets: Tensor  # [M + 1]

    @property
    def sizes(self) -> tuple[int, int, int, int, int]:
        """N, D, F, M, k: in the order in which every argument struct ends"""
        experts, d_model, d_ff = self.down.shape
        return self.order.numel(), d_model, d_ff, experts, self.inverse.shape[1]


class MlpLaunchers(Launchers):
    """Of the expert MLP; `place` is for operands and outputs."""

    @on_device
    def up(self, layer: Layer, x: Tensor, *, keep: bool = True, tile: int = AUTO_TILE):
        """preact [N, 2F] (None if not kept), hidden [N, F]"""
        rows, _, d_ff, *_ = layer.sizes
        preact = self._output(rows, 2 * d_ff, x.dtype) if keep else None
        hidden = self._output(rows, d_ff, x.dtype)
        inputs = [self.place(x), self.place(layer.gate_up), layer.order, layer.offsets]
        self._run("expert_up", ExpertUpArgs, layer, [*inputs, preact, hidden], x.dtype, tile)
        return preact, hidden

    @on_device
    def down(self, layer: Layer, hidden: Tensor, *, tile: int = AUTO_TILE) -> Tensor:
        """[T, D] if top_k is 1, else [N, D]: N = T then"""
        rows, d_model, *_ = layer.sizes
        out = self._output(rows, d_model, hidden.dtype)
        inputs = [self.place(hidden), self.place(layer.down), layer.weights]
        tensors = [*inputs, layer.order, layer.inverse, layer.offsets, out]
        self._run("expert_down", ExpertDownArgs, layer, tensors, hidden.dtype, tile)
        return out

    @on_device
    def hidden_bwd(
        self, layer: Layer, grad: Tensor, preact: Tensor, *, in_place: bool, tile: int = AUTO_TILE
    ) -> tuple[Tensor, Tensor, Tensor]:
        """grad_preact [N, 2F] (over a copy of preact, if in place), hidden [N, F], grad_weights"""
        rows, _, d_ff, *_ = layer.sizes
        preact = self.place(preact.clone())
        grad_preact = preact if in_place else self._output(rows, 2 * d_ff, grad.dtype)
        hidden = self._output(rows, d_ff, grad.dtype)
        grad_weights = fresh(layer.weights.shape, torch.float32)
        workspace = self.workspace("expert_hidden_bwd", c_int64(rows), c_int64(d_ff))
        inputs = [self.place(grad), self.place(layer.down), layer.weights]
        inputs += [layer.order, layer.inverse, layer.offsets, preact]
        tensors = [*inputs, grad_preact, hidden, grad_weights, workspace]
        self._run("expert_hidden_bwd", ExpertHiddenBwdArgs, layer, tensors, grad.dtype, tile)
        return grad_preact, hidden, grad_weights

    @on_device
    def input_bwd(self, layer: Layer, grad_preact: Tensor, *, tile: int = AUTO_TILE) -> Tensor:
        """[T, D] if top_k is 1, else [N, D]: N = T then"""
        rows, d_model, *_ = layer.sizes
        out = self._output(rows, d_model, grad_preact.dtype)
        inputs = [self.place(grad_preact), self.place(layer.gate_up)]
        tensors = [*inputs, layer.order, layer.inverse, layer.offsets, out]
        self._run("expert_input_bwd", ExpertInputBwdArgs, layer, tensors, grad_preact.dtype, tile)
        return out

    def _output(self, rows: int, width: int, dtype: torch.dtype) -> Tensor:
        return self.place(fresh((rows, width), dtype))

    def _run(
        self,
        op: str,
        args: type[ctypes.Structure],
        layer: Layer,
        tensors: Sequence[Tensor | None],
        dtype: torch.dtype,
        tile: int,
    ) -> None:
        pointers = [pointer(t) for t in tensors]
        self._launch(op, args(*pointers, *layer.sizes, DTYPES.index(dtype), tile), tensors)
