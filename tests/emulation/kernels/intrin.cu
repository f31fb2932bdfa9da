// SPDX-License-Identifier: Apache-2.0
// Each collective against what the CUDA documentation says it gives; counts the wrong answers.
#include <cute/arch/copy_sm75.hpp>
#include <cute/arch/util.hpp>
#include <cute/config.hpp>
#include <cute/numeric/numeric_types.hpp>

#include "cuda/device/portable.cuh"
#define EXPECT(x, y)                               \
  do {                                             \
    if ((x) != (y)) {                              \
      atomicAdd(bad, 1);                           \
      printf("line %d lane %d\n", __LINE__, lane); \
    }                                              \
  } while (0)
__global__ void intrin(int* bad) {
  UNIPOOL_SHARED_ARRAY(uint16_t, 4 * 64 + 8, raw);
  const int t = threadIdx.x + threadIdx.y * blockDim.x, lane = t % 32;
  const unsigned full = 0xffffffffu;
  EXPECT(__ballot_sync(full, lane % 3 == 0), 0x49249249u);
  EXPECT(__any_sync(full, lane == 7), 1);
  EXPECT(__all_sync(full, lane < 31), 0);
  EXPECT(__all_sync(full, lane < 32), 1);
  EXPECT(__reduce_add_sync(full, lane), 496);
  EXPECT(__reduce_max_sync(full, lane - 40), -9);
  EXPECT(__reduce_min_sync(full, lane - 40), -40);
  EXPECT(__reduce_or_sync(full, 1u << lane), full);
  EXPECT(__reduce_xor_sync(full, unsigned(lane)), 0u);
  EXPECT(__reduce_and_sync(full, unsigned(lane | 32)), 32u);
  EXPECT(__match_any_sync(full, lane / 4), 0xfu << (lane / 4 * 4));
  EXPECT(__shfl_sync(full, lane, 5), 5);
  EXPECT(__shfl_sync(full, lane, 3, 8), lane / 8 * 8 + 3);
  EXPECT(__shfl_sync(full, lane, 37), 5);
  EXPECT(__shfl_up_sync(full, lane, 3), lane < 3 ? lane : lane - 3);
  EXPECT(__shfl_up_sync(full, lane, 3, 8), lane % 8 < 3 ? lane : lane - 3);
  EXPECT(__shfl_down_sync(full, lane, 3), lane > 28 ? lane : lane + 3);
  EXPECT(__shfl_down_sync(full, lane, 3, 8), lane % 8 > 4 ? lane : lane + 3);
  EXPECT(__shfl_xor_sync(full, lane, 9), lane ^ 9);
  EXPECT(__shfl_xor_sync(full, double(lane), 4), double(lane ^ 4));
  if (lane < 16)
    EXPECT(__shfl_xor_sync(0xffffu, lane, 8), lane ^ 8);
  else
    EXPECT(__reduce_add_sync(0xffff0000u, 1), 16);  // two halves apart
  EXPECT(__syncthreads_count(t % 2), 48);
  EXPECT(__syncthreads_or(t == 95), 1);
  EXPECT(__syncthreads_and(t < 95), 0);
  EXPECT(int(threadIdx.y), t / 48);
  EXPECT(atomicMax(bad, -1) >= 0, true);
  uint16_t* m = reinterpret_cast<uint16_t*>((reinterpret_cast<uintptr_t>(raw) + 15) / 16 *
                                            16);  // four 8x8 matrices: m[i][r][c] = 64 i + 8 r + c
  for (int i = t; i < 256; i += 96) m[i] = uint16_t(i);
  __syncthreads();
  uint32_t d[4];
  const auto& row = *reinterpret_cast<const cute::uint128_t*>(m + 8 * lane);
  auto pair = [](int a, int b) { return uint32_t(a | b << 16); };
  const int g = lane / 4, c = 2 * (lane % 4);
  cute::SM75_U32x4_LDSM_N::copy(row, d[0], d[1], d[2], d[3]);
  for (int i = 0; i < 4; ++i) EXPECT(d[i], pair(64 * i + 8 * g + c, 64 * i + 8 * g + c + 1));
  cute::SM75_U16x8_LDSM_T::copy(row, d[0], d[1], d[2], d[3]);
  for (int i = 0; i < 4; ++i) EXPECT(d[i], pair(64 * i + 8 * c + g, 64 * i + 8 * (c + 1) + g));
  cute::SM75_U32x2_LDSM_N::copy(row, d[0], d[1]);
  EXPECT(d[1], pair(64 + 8 * g + c, 64 + 8 * g + c + 1));
}
extern "C" int sample_intrin(int* bad, cudaStream_t s) {
  return unipool::launch(intrin, dim3(2), dim3(48, 2), 0, s, bad);
}
