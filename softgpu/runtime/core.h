// SPDX-License-Identifier: Apache-2.0
// What every part of the runtime needs: its lock, a thread's state, errors that say why, the log.
#pragma once
#include <cuda_runtime_api.h>

#include <mutex>
#include <vector>

#define SOFTGPU_API extern "C" cudaError_t

namespace softgpu {

// One for everything: work runs while the call that submits it holds it.
extern std::recursive_mutex mutex;
using Lock = std::lock_guard<std::recursive_mutex>;

// What CUDA keeps for each thread of the host.
struct Thread {
  int device = 0;
  cudaError_t last = cudaSuccess;
  cudaStreamCaptureMode capture_mode = cudaStreamCaptureModeGlobal;
  struct Call {
    dim3 grid, block;
    size_t smem;
    cudaStream_t stream;
  };
  std::vector<Call> calls;  // of <<<>>>, between its two halves
};
extern thread_local Thread me;

// Keeps an error for cudaGetLastError, and returns it.
cudaError_t done(cudaError_t error);

// The same, and says why on stderr, in one line.
__attribute__((format(printf, 2, 3))) cudaError_t refuse(cudaError_t error, const char* format,
                                                         ...);

// A line of the log that softgpu.calls() reads; nothing while nobody reads.
__attribute__((format(printf, 1, 2))) void note(const char* format, ...);

}  // namespace softgpu

SOFTGPU_API softgpu_not_provided(const char* name);
