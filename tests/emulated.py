# SPDX-License-Identifier: Apache-2.0
"""The CUDA kernels on the CPU, as ops of another namespace: see emulation/README.md.

UNIPOOL_EMULATION chooses the flavour: fast (the default), check (races and bounds), or off.
"""

import os
import sys
import warnings
from pathlib import Path

import torch
from torch._library.simple_registry import singleton as registry

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "emulation"))
import build

NAMESPACE = "unipool_emulated"


def load() -> str | None:
    """The namespace of the emulated ops, built if need be; None where they cannot be."""
    flavour = os.environ.get("UNIPOOL_EMULATION", "fast")
    if flavour == "off":
        return None
    try:
        torch.ops.load_library(build.ops_library(flavour))
    except build.BuildError as error:
        warnings.warn(f"the CUDA kernels are not tested: {error}", stacklevel=1)
        return None
    for name in op_names("unipool"):
        if hasattr(getattr(torch.ops, NAMESPACE), name):
            fake = registry.find(f"unipool::{name}").fake_impl.kernel.func
            torch.library.register_fake(f"{NAMESPACE}::{name}", fake)
    return NAMESPACE


def op_names(namespace: str) -> list[str]:
    prefix = f"{namespace}::"
    names = torch._C._dispatch_get_all_op_names()
    return sorted({n.removeprefix(prefix).split(".")[0] for n in names if n.startswith(prefix)})
