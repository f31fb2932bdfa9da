# SPDX-License-Identifier: Apache-2.0
"""The constant c(M, k) of NormRouter, docs/math.md (3)."""

import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from published import CALIBRATION, FLOORED

from unipool import reference
from unipool.nn import (
    NormRouter,
)
from unipool.nn.router import norm_router_calibration

SIZES = [*range(1, 17), 24, 32, 33, 64, 96, 127, 160, 192, 288, 384, 513, 1024]


@pytest.mark.parametrize(("M", "k", "value"), CALIBRATION)
def test_calibration_has_the_published_values(M, k, value):
    assert abs(norm_router_calibration(M, k) - value) < 0.02


@pytest.mark.parametrize(("M", "k"), [(64, 1), (64, 8), (96, 2), (160, 16), (384, 4), (1024, 1)])
def test_calibration_agrees_with_an_independent_estimate(M, k):
    due = reference.norm_router_calibration(M, k, draws=1 << 14)
    assert math.isclose(norm_router_calibration(M, k), due, rel_tol=0.006)


@pytest.mark.parametrize(("M", "k", "value"), FLOORED)
def test_calibration_of_small_pools(M, k, value):
    assert abs(norm_router_calibration(M, k) - value) < 5e-5


def test_calibration_of_two_experts_agrees_with_the_integral():
    """On the circle: a quarter of the angles has two positive coordinates, two have one, and the
    last, without any, does not count. A norm below 1 / sqrt(2) counts as that."""
    secant = math.asinh(1.0)  # of 1 / cos over [0, pi / 4]
    both = {1: 4 / math.pi * secant, 2: 1.0}
    one = 2 / math.pi * (secant + math.sqrt(2) * math.pi / 4)
    for k, mean in both.items():
        due = (mean + 2 * one) / 3
        assert math.isclose(norm_router_calibration(2, k), due, rel_tol=0.004)


@pytest.mark.parametrize(("M", "k"), [(2, 1), (3, 1), (3, 3), (4, 2), (5, 1), (8, 1), (8, 4)])
def test_calibration_of_small_pools_agrees_with_an_independent_estimate(M, k):
    g = np.random.default_rng(3).standard_normal((1 << 18, M))
    g = g[(g > 0).any(1)]
    norms = np.sort(np.maximum(g, 0), 1)[:, M - k :] / np.sqrt((g**2).sum(1, keepdims=True))
    due = (1 / np.maximum(np.sqrt((norms**2).sum(1)), M**-0.5)).mean()
    assert math.isclose(norm_router_calibration(M, k), due, rel_tol=0.006)


@pytest.mark.parametrize("M", SIZES)
def test_calibration_is_finite_and_falls_with_k(M):
    """1 <= c: the norm of a part of a unit vector is at most 1; more experts, a longer part."""
    ks = sorted({k for k in (1, 2, 3, 4, 8, 15, 16) if k <= M})
    values = [norm_router_calibration(M, k) for k in ks]
    assert all(math.isfinite(c) and 1 <= c <= 40 for c in values)
    assert values == sorted(values, reverse=True)


def test_calibration_grows_with_the_pool():
    values = [norm_router_calibration(M, 1) for M in (16, 32, 64, 128, 256, 512, 1024)]
    assert values == sorted(values)


def test_calibration_is_the_same_in_another_process():
    """Whatever was drawn from torch's and numpy's global generators before."""
    program = (
        "import numpy, torch; numpy.random.seed(7); torch.manual_seed(7); torch.set_num_threads(1);"
        "from unipool.nn.router import norm_router_calibration as c;"
        "print([c(96, 2).hex(), c(8, 1).hex()])"
    )
    out = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    here = [norm_router_calibration(96, 2).hex(), norm_router_calibration(8, 1).hex()]
    assert out.stdout.strip() == str(here)


def test_calibration_leaves_the_global_generators_alone():
    before = torch.get_rng_state(), np.random.get_state()[1].tolist()
    norm_router_calibration(47, 2)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.random.get_state()[1].tolist() == before[1]


def test_weights_start_with_unit_norm(device):
    """What the calibration is for: the mean of 1 / |weights / c| is c, so |weights| is about 1."""
    router = NormRouter(64, 96, 2).to(device)
    x = torch.randn(4000, 64, device=device)
    norm = router(x).weights.norm(dim=1)
    assert abs(norm.mean() - 1) < 0.05
