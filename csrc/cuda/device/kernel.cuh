// SPDX-License-Identifier: Apache-2.0
// How a kernel is launched, and where its dynamic shared memory is.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <atomic>
#include <cstdint>

namespace unipool {

// The block's dynamic shared memory. 128 bytes, once through all banks, are what the swizzled tiles
// of mma.sync are aligned to; static arrays are padded to them.
template <class T>
__device__ __forceinline__ T* dynamic_shared() {
  extern __shared__ __align__(128) unsigned char dynamic_shared_bytes[];
  return reinterpret_cast<T*>(dynamic_shared_bytes);
}

template <class... P, class... A>
cudaError_t launch(void (*kernel)(P...), dim3 grid, dim3 block, size_t smem, cudaStream_t stream,
                   const A&... args) {
  kernel<<<grid, block, smem, stream>>>(P(args)...);
  return cudaGetLastError();
}

// Of the current device.
inline cudaError_t device_attribute(int* value, cudaDeviceAttr attribute) {
  int device;
  const cudaError_t error = cudaGetDevice(&device);
  return error != cudaSuccess ? error : cudaDeviceGetAttribute(value, attribute, device);
}

constexpr int kKnownDevices = 64;  // of which a kernel's facts are kept

// Blocks of a kernel, of `threads` threads and `smem` bytes of dynamic shared memory, that one
// multiprocessor holds at once; 0 if a block does not fit. The kernel may then use all the shared
// memory that its static arrays leave of what a block can opt in to: the same limit for every
// launch, so that threads do not lower each other's. Asked of the runtime once per device, and
// again when `smem` changes.
template <auto kKernel>
cudaError_t resident_blocks(int threads, size_t smem, int* blocks) {
  static std::atomic<uint64_t> known[kKnownDevices];  // smem + 1 and, in the low byte, blocks
  int device, optin;
  cudaError_t error = cudaGetDevice(&device);
  if (error != cudaSuccess) return error;
  const bool kept = device < kKnownDevices;
  if (const uint64_t last = kept ? known[device].load() : 0; last >> 8 == smem + 1) {
    *blocks = int(last & 0xff);
    return cudaSuccess;
  }
  cudaFuncAttributes facts;
  error = cudaDeviceGetAttribute(&optin, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  if (error == cudaSuccess) error = cudaFuncGetAttributes(&facts, kKernel);
  if (error == cudaSuccess) {
    error = cudaFuncSetAttribute(kKernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                 optin - int(facts.sharedSizeBytes));
  }
  if (error == cudaSuccess) {
    error = cudaOccupancyMaxActiveBlocksPerMultiprocessor(blocks, kKernel, threads, smem);
  }
  if (error == cudaSuccess && kept) known[device].store((smem + 1) << 8 | uint64_t(*blocks));
  return error;
}

}  // namespace unipool
