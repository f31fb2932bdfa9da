# SPDX-License-Identifier: Apache-2.0
"""UniPool: Mixture-of-Experts layers that share one pool of experts (arXiv:2605.06665)."""

from importlib import metadata

from unipool import nn, ops

__all__ = ["nn", "ops"]
__version__ = metadata.version("unipool")
