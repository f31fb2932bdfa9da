# SPDX-License-Identifier: Apache-2.0
"""Modules: routers, the expert pool, and the pool's balance loss."""

from unipool.nn.balance import PoolBalancer
from unipool.nn.experts import ExpertPool, pooled_moe
from unipool.nn.pool_pass import PoolPass
from unipool.nn.recurrent import RecurrentRouter
from unipool.nn.router import NormRouter, SoftmaxRouter

__all__ = [
    "ExpertPool",
    "NormRouter",
    "PoolBalancer",
    "PoolPass",
    "RecurrentRouter",
    "SoftmaxRouter",
    "pooled_moe",
]
