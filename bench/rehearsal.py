# SPDX-License-Identifier: Apache-2.0
"""Whether figures are those of a GPU. Needs nothing that has to be built."""

import ctypes
import os


def software_gpu() -> bool:
    """Whether this environment's GPU is that of softgpu/, whose times mean nothing."""
    try:
        return hasattr(ctypes.CDLL("libcudart.so.13"), "softgpu_log")
    except OSError:
        return False


def is_rehearsal() -> bool:
    """Whether figures show only that the program runs: gpu_check --rehearse, or no real GPU."""
    return bool(os.environ.get("UNIPOOL_REHEARSAL")) or software_gpu()
