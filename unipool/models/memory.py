# SPDX-License-Identifier: Apache-2.0
"""Whether a model can fit at all, by arithmetic, before any of it is made."""

import os
from pathlib import Path

import torch
from transformers import LlamaConfig, PreTrainedConfig

from unipool.errors import InputError

from .configuration_unipool import UniPoolConfig
from .presets import parameter_counts

TRAINED = 16  # bytes per parameter: float32 weights, gradients, and AdamW's two moments


def memory_of(device: str) -> int:
    """Bytes of the memory of `device`, "cpu" or "cuda"; swap space counts."""
    if device == "cuda":
        return torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        sizes = dict(line.split(":", 1) for line in lines)
        return sum(int(sizes[name].split()[0]) * 1024 for name in ("MemTotal", "SwapTotal"))
    except (OSError, KeyError, ValueError):
        pass
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return 1 << 62  # not known: nothing is refused


def check_memory(
    config: PreTrainedConfig, device: str, bytes_per_parameter: int, extra: int = 0
) -> None:
    """InputError if the parameters and `extra` bytes exceed the memory of `device`.

    A lower bound: what passes may still need more than there is.
    """
    parameters = parameter_counts(config)["total"]
    need, there = parameters * bytes_per_parameter + extra, memory_of(device)
    if need > there:
        raise InputError(
            f"the model has {parameters:.3g} parameters and needs at least {need / 1e9:,.1f} GB "
            f"with this batch; {device} has {there / 1e9:,.1f} GB"
        )


def check_weights_hold(config: PreTrainedConfig, folder: Path) -> None:
    """InputError if the weights in `folder` are too small for what its configuration describes."""
    if not isinstance(config, UniPoolConfig | LlamaConfig):
        return
    parameters = parameter_counts(config)["total"]
    size = sum(path.stat().st_size for path in Path(folder).glob("*.safetensors"))
    if parameters > 2 * size:  # four bits are the least that a weight is kept in
        raise InputError(
            f"model: {folder}/config.json describes {parameters:.3g} parameters, which "
            f"{size:,} bytes of weights cannot hold"
        )
