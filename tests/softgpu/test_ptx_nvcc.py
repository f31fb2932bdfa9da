# SPDX-License-Identifier: Apache-2.0
"""What nvcc makes of ordinary CUDA C++: calls, tables, slow paths, halves, votes of a block."""

import re
import shutil
import subprocess

import numpy as np
import pytest
from ptx_kernels import needs_build

from softgpu import ptx

pytestmark = [
    needs_build,
    pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not installed"),
]

SOURCE = r"""
#include <cassert>
#include <cuda_bf16.h>
#include <cuda_fp16.h>

__constant__ int table[4] = {3, 1, 4, 1};
__device__ float scale = 0.5f;
__device__ int total;

__device__ __noinline__ int collatz(int n) {
  int steps = 0;
  while (n != 1) n = n % 2 ? 3 * n + 1 : n / 2, ++steps;
  return steps;
}
struct Pair { double sum; int count; };
__device__ __noinline__ Pair pair_of(double x, int n) { return {x * n, n + 1}; }

extern "C" __global__ void calls(int* out) {
  out[threadIdx.x] = collatz(threadIdx.x + 1) + table[threadIdx.x % 4];
  const Pair p = pair_of(threadIdx.x / 3.0, threadIdx.x);
  out[threadIdx.x] += p.count + int(p.sum);
}

extern "C" __global__ void switches(const int* in, int* out) {
  int r = 0;
  switch (in[threadIdx.x]) {
    case 0: r = 10 + in[0]; break;
    case 1: r = 200 * in[1]; break;
    case 2: r = in[2] ^ 77; break;
    case 3: r = in[3] - 9; break;
    case 4: r = in[4] << 3; break;
    case 5: r = ~in[5]; break;
    case 6: r = in[6] * in[6]; break;
    default: r = -1;
  }
  out[threadIdx.x] = r;
}

extern "C" __global__ void math(const float* x, float* out) {
  const int t = threadIdx.x;
  float* o = out + 8 * t;
  o[0] = sinf(x[t]), o[1] = expf(x[t] / 1e5f), o[2] = x[t] / 3.0f, o[3] = rintf(x[t]);
  o[4] = powf(fabsf(x[t]), 0.3f), o[5] = scale * tanhf(x[t]), o[6] = fmodf(x[t], 7.0f);
  o[7] = float(1.0 / double(x[t] + 0.25f));
}

extern "C" __global__ void halves(const __half2* a, const __nv_bfloat162* b, float* out) {
  const int t = threadIdx.x;
  const __half2 h = __hfma2(a[t], a[t], __float2half2_rn(1.0f));
  const __nv_bfloat162 c = __hmax2(__hadd2(b[t], b[t]), __float2bfloat162_rn(0.5f));
  out[5 * t] = __low2float(h), out[5 * t + 1] = __high2float(h);
  out[5 * t + 2] = __low2float(c), out[5 * t + 3] = __high2float(c);
  out[5 * t + 4] = __hlt(__low2half(a[t]), __high2half(a[t])) ? 1.0f : 0.0f;
}

extern "C" __global__ void block(int* out, unsigned long long* big) {
  const int even = __syncthreads_count(threadIdx.x % 2 == 0);
  const int all = __syncthreads_and(threadIdx.x < 1000), any = __syncthreads_or(threadIdx.x == 70);
  atomicAdd(&total, 1);
  atomicMax(big, 1ull << threadIdx.x % 64);
  int seen = *(volatile int*)&out[128], wanted;
  do wanted = seen, seen = atomicCAS(&out[128], wanted, wanted + 2); while (seen != wanted);
  __syncthreads();
  out[threadIdx.x] = 1000 * even + 100 * all + 10 * any + (total == 128);
}

extern "C" __global__ void asserts(int n) { assert(int(threadIdx.x) != n); }
"""


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("nvcc")
    source = folder / "source.cu"
    source.write_text(SOURCE)
    target = folder / "source.ptx"
    command = ["nvcc", "-std=c++17", "-arch=sm_90a", "-ptx", source, "-o", target]
    made = subprocess.run(command, capture_output=True, text=True, check=False)
    assert made.returncode == 0, made.stderr
    return target.read_text()


def collatz(n: int) -> int:
    steps = 0
    while n != 1:
        n, steps = (3 * n + 1 if n % 2 else n // 2), steps + 1
    return steps


@pytest.mark.parametrize("settings", ["", "check=1", "order=random:2"])
def test_calls_and_constants(text, settings):
    out = np.zeros(64, np.int32)
    ptx.run_ptx(text, "calls", 1, 64, [out], 0, settings)
    want = [collatz(t + 1) + [3, 1, 4, 1][t % 4] + t + 1 + int(t / 3.0 * t) for t in range(64)]
    assert out.tolist() == want
    assert re.search(r"call\.uni", text)


def test_switches(text):
    x = np.array([0, 1, 2, 3, 4, 5, 6, 7, 3, 1], np.int32)
    out = np.zeros(10, np.int32)
    ptx.run_ptx(text, "switches", 1, 10, [x, out])
    assert out.tolist() == [10, 200, 2 ^ 77, -6, 32, ~5, 36, -1, -6, 200]


def test_slow_paths(text):
    x = np.array([0.5, -3, 1e5, 123456.7, 2.5, 3.5, -0.5, 7e8], np.float32)
    out = np.zeros((8, 8), np.float32)
    ptx.run_ptx(text, "math", 1, 8, [x, out])
    d = x.astype(np.float64)
    with np.errstate(over="ignore"):
        want = [np.sin(d), np.exp(d / 1e5), d / 3, np.rint(d), np.abs(d) ** 0.3, np.tanh(d) / 2]
        want += [np.fmod(d, 7), 1 / (d + 0.25)]
        assert np.allclose(out.T, np.array(want).astype(np.float32), rtol=1e-5, atol=1e-6)


def test_halves(text):
    rng = np.random.default_rng(0)
    a = rng.standard_normal((32, 2)).astype(np.float16)
    b = (rng.standard_normal((32, 2)).astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)
    out = np.zeros((32, 5), np.float32)
    ptx.run_ptx(text, "halves", 1, 32, [a, b, out])
    square = (a.astype(np.float64) ** 2 + 1).astype(np.float16)
    assert (out[:, :2] == square).all()
    twice = (b.astype(np.uint32) << 16).view(np.float32) * 2
    assert (out[:, 2:4] == np.maximum(twice, 0.5)).all()
    assert (out[:, 4] == (a[:, 0] < a[:, 1])).all()


@pytest.mark.parametrize("settings", ["", "order=reverse", "order=random:1"])
def test_votes_of_a_block(text, settings):
    out, big = np.zeros(129, np.int32), np.zeros(1, np.uint64)
    ptx.run_ptx(text, "block", 1, 128, [out, big], 0, settings)
    assert (out[:128] == 64111).all()
    assert out[128] == 256
    assert big[0] == 1 << 63


def test_assertions(text):
    ptx.run_ptx(text, "asserts", 1, 64, [np.int32(64)])
    with pytest.raises(
        ptx.PtxError, match=r"assertion failed: int\(threadIdx.x\) != n in .*source"
    ):
        ptx.run_ptx(text, "asserts", 1, 64, [np.int32(40)])
