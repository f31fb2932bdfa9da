# SPDX-License-Identifier: Apache-2.0
"""The GPUs that the software GPU can be: what they say of themselves, which code they run, and that
every op launches on each. A process is one GPU, so each test asks another process."""

import json
import os
import subprocess
import sys
from pathlib import Path

import planted
import pytest

pytestmark = planted.needs_softgpu

HERE = Path(__file__).resolve().parent
KIB = 1024
# capability, shared memory that a block can opt in to, threads and blocks per multiprocessor
PROFILES = {
    "h100": ((9, 0), 227 * KIB, 2048, 32),
    "h200": ((9, 0), 227 * KIB, 2048, 32),
    "a100": ((8, 0), 163 * KIB, 2048, 32),
    "rtx3090": ((8, 6), 99 * KIB, 1536, 16),
    "l40s": ((8, 9), 99 * KIB, 1536, 24),
    "b200": ((10, 0), 227 * KIB, 2048, 32),
    "rtx5090": ((12, 0), 99 * KIB, 1536, 24),
}

FACTS = """
import json, planted, torch
p = torch.cuda.get_device_properties(0)
kernels = planted.Planted(planted.build())
print(json.dumps({
    "capability": [p.major, p.minor],
    "optin": p.shared_memory_per_block_optin,
    "threads": p.max_threads_per_multi_processor,
    "sms": p.multi_processor_count,
    "resident": kernels.occupancy("bounded", 32),
    "by_shared": kernels.occupancy("shared", 1024, 40 * 1024),
    "by_registers": kernels.occupancy("greedy", 128),
    **kernels.attributes("greedy"),
    "limit": [kernels.dynamic_limit("shared", p.shared_memory_per_block_optin - 4096 + more)
              for more in (0, 1)],
}))
"""


def python(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    path = os.pathsep.join(map(str, (HERE, HERE.parent / "support", HERE.parents[1])))
    env = {k: v for k, v in os.environ.items() if k != "SOFTGPU_SMS"}
    env |= {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", **environment}
    return subprocess.run([sys.executable, *arguments], env=env, capture_output=True, text=True)


def facts(gpu: str, **environment: str) -> dict:
    run = python("-c", FACTS, SOFTGPU_GPU=gpu, **environment)
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


@pytest.mark.parametrize("gpu", PROFILES)
def test_a_gpu_has_the_limits_of_its_capability(gpu):
    planted.build()
    capability, optin, threads, blocks = PROFILES[gpu]
    f = facts(gpu)
    assert tuple(f["capability"]) == capability
    assert f["optin"] == optin
    assert f["threads"] == threads
    assert f["limit"] == ["cudaSuccess", "cudaErrorInvalidValue"]
    # a block of one warp takes the place of four: a multiprocessor has four parts
    assert f["resident"] == min(blocks, threads // 128)
    # 4 KiB static, 40 KiB dynamic, 1 KiB of the system's
    assert f["by_shared"] == min((optin + KIB) // (45 * KIB), threads // 1024)
    per_warp = -(-f["registers"] * 32 // 256) * 256
    assert f["registers"] > 100
    assert f["by_registers"] == min(65536 // 4 // per_warp, threads // 128, blocks)


@pytest.mark.parametrize(
    ("gpu", "binary", "ptx"),
    [
        ("a100", 80, 80),
        ("l40s", 80, 80),  # the cubin of sm_80 is of its major capability
        ("h100", 90, 90),
        ("b200", 100, 80),  # sm_90a is for that one only; PTX of compute_80 is compiled
        ("rtx5090", 120, 80),
    ],
)
def test_a_gpu_runs_the_newest_code_that_it_can(gpu, binary, ptx):
    f = facts(gpu)
    assert (f["binary_version"], f["ptx_version"]) == (binary, ptx)


def test_multiprocessors_can_be_fewer():
    assert facts("h100")["sms"] == 132
    assert facts("h100", SOFTGPU_SMS="8")["sms"] == 8


@pytest.mark.parametrize(
    ("environment", "says"),
    [
        ({"SOFTGPU_GPU": "h1000"}, "softgpu: SOFTGPU_GPU=h1000 is none of h100, h200, "),
        ({"SOFTGPU_SMS": "many"}, "softgpu: SOFTGPU_SMS=many is not a whole number from 1"),
        ({"SOFTGPU_DEVICES": "-1"}, "softgpu: SOFTGPU_DEVICES=-1 is not a whole number from 0"),
    ],
)
def test_a_mistyped_setting_ends_the_program(environment, says):
    run = python("-c", "import torch; torch.cuda.init()", **environment)
    assert run.returncode == 1
    assert says in run.stderr


@pytest.mark.parametrize("gpu", PROFILES)
def test_every_op_launches_and_is_right(gpu):
    """A tile that does not fit the GPU would fail here, as its launch does on the GPU."""
    run = python(str(HERE / "launch_every_op.py"), SOFTGPU_GPU=gpu, SOFTGPU_SMS="8")
    assert run.returncode == 0, run.stdout + run.stderr
