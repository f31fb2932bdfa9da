# SPDX-License-Identifier: Apache-2.0
"""What the ops share: the type of sums, autocast, and checks that C++ cannot word."""

import torch
from torch import Tensor


def acc_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 for float64, else float32: the type of router outputs and of sums."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def check_tensors(op: str, **arguments: object) -> None:
    """One line for an argument that is no tensor; the rest is checked by the op itself."""
    for name, value in arguments.items():
        if not isinstance(value, Tensor):
            raise TypeError(f"{op}: {name} must be a Tensor, got {type(value).__name__}")


def check_int(op: str, name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int | torch.SymInt):
        raise TypeError(f"{op}: {name} must be an int, got {type(value).__name__}")


def autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors in the autocast dtype of their device, where autocast is on, as for matmul."""
    device = tensors[0].device.type
    if not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(t.to(dtype) if t.is_floating_point() else t for t in tensors)
