# SPDX-License-Identifier: Apache-2.0
"""Memory, streams and events of the runtime, as the tests of faults make them."""

import ctypes

import torch
from planted import Planted

OK = "cudaSuccess"


def memory(n: int = 1024) -> torch.Tensor:
    return torch.zeros(n, dtype=torch.int32, device="cuda")


class Handle:
    """A stream or an event made by the runtime's own function."""

    def __init__(self, kernels: Planted, function: str, *flags: object) -> None:
        self.handle = ctypes.c_void_p()
        assert kernels.call(function, ctypes.byref(self.handle), *flags) == OK

    @property
    def value(self) -> int:
        return self.handle.value
