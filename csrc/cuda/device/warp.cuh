// SPDX-License-Identifier: Apache-2.0
// Collectives of a warp, or of each group of kLanes neighbouring lanes in it. All 32 lanes call
// them. Sums are formed in the same order in every lane, so all lanes get the same bits.
#pragma once
#include "cuda/device/kernel.cuh"
#include "unipool/types.h"

namespace unipool {

constexpr unsigned kFullMask = 0xffffffffu;

template <int kLanes = kWarp>
__device__ __forceinline__ float group_sum(float v) {
#pragma unroll
  for (int d = kLanes / 2; d > 0; d /= 2) v += __shfl_xor_sync(kFullMask, v, d);
  return v;
}

// NaN is passed over, as by fmaxf.
template <int kLanes = kWarp>
__device__ __forceinline__ float group_max(float v) {
#pragma unroll
  for (int d = kLanes / 2; d > 0; d /= 2) v = fmaxf(v, __shfl_xor_sync(kFullMask, v, d));
  return v;
}

// Sum of v over the lanes below this one; `total` is the sum over all.
__device__ __forceinline__ int exclusive_scan(int v, int lane, int& total) {
  int sum = v;
#pragma unroll
  for (int d = 1; d < kWarp; d *= 2) {
    const int below = __shfl_up_sync(kFullMask, sum, d);
    if (lane >= d) sum += below;
  }
  total = __shfl_sync(kFullMask, sum, kWarp - 1);
  return sum - v;
}

// Unsigned keys in the order of the scores: -0 equals 0, all NaN are equal and the greatest. No
// score has the key 0, which stands for "not to be chosen".
__device__ __forceinline__ uint32_t order_key(float score) {
  const uint32_t bits = __float_as_uint(score + 0.f);
  const uint32_t key = bits & 0x80000000u ? ~bits : bits | 0x80000000u;
  return score != score ? 0xffffffffu : key;
}
__device__ __forceinline__ float score_of(uint32_t key) {
  return __uint_as_float(key == 0xffffffffu  ? 0x7fffffffu
                         : key & 0x80000000u ? key ^ 0x80000000u
                                             : ~key);
}

}  // namespace unipool
