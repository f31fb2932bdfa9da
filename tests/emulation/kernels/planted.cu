// SPDX-License-Identifier: Apache-2.0
// One small kernel, right for kNone, with one fault for every other value: what the emulator must
// find. kThreads elements in and out; two blocks, of which the first writes.
#include "cuda/device/portable.cuh"

namespace {

constexpr int kThreads = 128;

enum Fault {  // numbered as in test_emulator.py
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
  kFaults,
};

template <int kFault>
__global__ void planted(const float* in, float* out, int* counter) {
  UNIPOOL_SHARED_ARRAY(float, kThreads, buffer);
  UNIPOOL_SHARED_ARRAY(float, kThreads, pairs);
  const int t = threadIdx.x, lane = t % 32;
  if (!(kFault == kHalfNeverWritten && t % 2)) buffer[t] = in[t];
  if (kFault != kNoBarrierAfterWrite) __syncthreads();
  float v = buffer[kThreads - 1 - t];
  if (kFault != kNoBarrierBeforeReuse) __syncthreads();
  buffer[t] = 2 * v;

  pairs[t] = v;
  if (kFault != kNoSyncwarp) __syncwarp();
  v += pairs[t ^ 1];
  if (kFault != kDivergentBarrier || t < 64) __syncthreads();
  if (kFault == kDivergentShuffle && lane < 16) v += __shfl_xor_sync(0xffffffffu, v, 1);

  if (kFault == kSharedPastEnd) v += pairs[kThreads + t / 64];
  if (kFault == kGlobalReadPastEnd && t == 0) v += in[kThreads];
  if (kFault == kGlobalWritePastEnd && t == 0) out[kThreads] = 0;
  if (kFault == kMisalignedLoad) v += __ldg(reinterpret_cast<const float4*>(in + 1)).x;
  if (kFault == kMisalignedStore) __stwb(reinterpret_cast<float4*>(out + 2), float4{});
  if (kFault == kRacingBlocks && t == 0) counter[0] += 1;
  if (kFault != kRacingBlocks && t == 0) atomicAdd(counter, 1);
  if (kFault == kEarlyReturn && t == 5) return;
  __syncthreads();
  if (kFault == kNullPointer && t == 99) *static_cast<float*>(nullptr) = v;
  if (blockIdx.x == 0) out[t] = v + buffer[t];
}

template <int kFault>
int run(int fault, const float* in, float* out, int* counter, cudaStream_t stream) {
  if constexpr (kFault == kFaults) {
    return cudaErrorInvalidValue;
  } else if (fault == kFault) {
    return unipool::launch(planted<kFault>, dim3(2), dim3(kThreads), 0, stream, in, out, counter);
  } else {
    return run<kFault + 1>(fault, in, out, counter, stream);
  }
}

}  // namespace

extern "C" int sample_planted(int fault, const float* in, float* out, int* counter,
                              cudaStream_t stream) {
  return run<0>(fault, in, out, counter, stream);
}
