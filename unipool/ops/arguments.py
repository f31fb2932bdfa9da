# SPDX-License-Identifier: Apache-2.0
"""Arguments of the ops: checks that C++ cannot word, autocast, and the type of sums."""

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


def check_devices(op: str, **tensors: Tensor | None) -> None:
    """For the fakes, which also run when an argument is on the meta device and others are not."""
    given = {name: t for name, t in tensors.items() if t is not None}
    first, device = next((name, t.device) for name, t in given.items())
    for name, t in given.items():
        if t.device != device:
            raise ValueError(
                f"{op}: {name} must be on the device of {first} ({device}), got {t.device}"
            )


def autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors in the autocast dtype of their device, where autocast is on, as for matmul."""
    device = tensors[0].device.type
    # Meta tensors have no autocast to ask for; torch.compile cannot trace is_autocast_available.
    if device == "meta" or not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    castable = [t.is_floating_point() and t.dtype != torch.float64 for t in tensors]
    return tuple(t.to(dtype) if cast else t for t, cast in zip(tensors, castable, strict=True))
