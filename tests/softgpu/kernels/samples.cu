// SPDX-License-Identifier: Apache-2.0
// Two small kernels that keep the software GPU honest.
#include <cstdint>

constexpr int kThreads = 128;

enum Fault {  // numbered as in test_checker.py
  kNone,
  kNoBarrierAfterWrite,
  kNoBarrierBeforeReuse,
  kNoSyncwarp,
  kDivergentBarrier,
  kHalfNeverWritten,
  kDivergentShuffle,
  kSharedPastEnd,
  kGlobalReadPastEnd,
  kGlobalWritePastEnd,
  kMisalignedLoad,
  kMisalignedStore,
  kRacingBlocks,
  kEarlyReturn,
  kNullPointer,
};

// Right for kNone, with one fault for every other value. kThreads elements in and out; two blocks,
// of which the first writes.
extern "C" __global__ void planted(const float* in, float* out, int* counter, float* null) {
  __shared__ float buffer[kThreads];
  __shared__ float pairs[kThreads];
  const int fault = planted_fault(), t = threadIdx.x, lane = t % 32;
  if (!(fault == kHalfNeverWritten && t % 2)) buffer[t] = in[t];
  if (fault != kNoBarrierAfterWrite) __syncthreads();
  float v = buffer[kThreads - 1 - t];
  if (fault != kNoBarrierBeforeReuse) __syncthreads();
  buffer[t] = 2 * v;

  pairs[t] = v;
  if (fault != kNoSyncwarp) __syncwarp();
  v += pairs[t ^ 1];
  if (fault != kDivergentBarrier || t < 64) __syncthreads();
  if (fault == kDivergentShuffle && lane < 16) v += __shfl_xor_sync(0xffffffffu, v, 1);

  if (fault == kSharedPastEnd) v += pairs[kThreads + t / 64];
  if (fault == kGlobalReadPastEnd && t == 0) v += in[kThreads];
  if (fault == kGlobalWritePastEnd && t == 0) out[kThreads] = 0;
  if (fault == kMisalignedLoad) v += __ldg(reinterpret_cast<const float4*>(in + 1)).x;
  if (fault == kMisalignedStore) __stwb(reinterpret_cast<float4*>(out + 2), float4{});
  if (fault == kRacingBlocks && t == 0) counter[0] += 1;
  if (fault != kRacingBlocks && t == 0) atomicAdd(counter, 1);
  if (fault == kEarlyReturn && t == 5) return;
  __syncthreads();
  if (fault == kNullPointer && t == 99) *null = v;
  if (blockIdx.x == 0) out[t] = v + buffer[t];
}

// Each collective against what the CUDA documentation says it gives: wrong[0] counts the wrong
// answers, wrong[1] is a line that has one. Blocks of (48, 2) threads.
#define EXPECT(x, y)       \
  do {                     \
    if ((x) != (y)) {      \
      atomicAdd(wrong, 1); \
      wrong[1] = __LINE__; \
    }                      \
  } while (0)
extern "C" __global__ void collectives(int* wrong) {
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
  EXPECT(atomicMax(wrong, -1) >= 0, true);
}
