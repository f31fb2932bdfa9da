# SPDX-License-Identifier: Apache-2.0
"""The device that the running test is for. The fixture `device` sets it (conftest.py), so that the
helpers of a test file create models and tensors there without a parameter for it."""

from importlib.util import find_spec

import torch

_current = torch.device("cpu")


def current() -> torch.device:
    return _current


def select(device: torch.device) -> None:
    global _current
    _current = device


def software_gpu() -> bool:
    """Whether what torch calls cuda is the software GPU of this environment."""
    return find_spec("softgpu") is not None


def widest_float() -> torch.dtype:
    """The most exact dtype of the ops there: CUDA offers no float64."""
    return torch.float64 if _current.type == "cpu" else torch.float32
