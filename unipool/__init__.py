# SPDX-License-Identifier: Apache-2.0
"""UniPool: Mixture-of-Experts layers that share one pool of experts (arXiv:2605.06665)."""

from importlib import metadata

__all__ = ["nn", "ops"]

try:
    __version__ = metadata.version("unipool")
except metadata.PackageNotFoundError:  # run from a source tree that is not installed
    __version__ = "0+source"

try:
    from unipool import nn, ops
except ImportError as error:
    # Said at the first use instead, so that `python -m unipool.doctor` can start and say the fix.
    _reason = str(error)

    def __getattr__(name: str) -> object:
        if name in __all__:
            raise ImportError(_reason)
        raise AttributeError(f"module 'unipool' has no attribute {name!r}")
