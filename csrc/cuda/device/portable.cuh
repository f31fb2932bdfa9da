// SPDX-License-Identifier: Apache-2.0
// The few things that a kernel cannot spell in plain C++: how it is launched and where its shared
// memory is. The second half serves compilers that know no CUDA (emulation/ in the repository).
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

#ifdef __CUDACC__

// A static shared array `name` of N T's.
#define UNIPOOL_SHARED_ARRAY(T, N, name) __shared__ T name[N]

namespace unipool {

// The block's dynamic shared memory, of which it uses `count` T's.
template <class T>
__device__ __forceinline__ T* dynamic_shared(size_t /*count*/) {
  extern __shared__ __align__(1024) unsigned char dynamic_shared_bytes[];
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

// Blocks of a kernel that one multiprocessor holds at once. The kernel may use all the shared
// memory that a block can opt in to: once set, that stays, whichever thread launches it next.
template <auto kKernel>
cudaError_t resident_blocks(int threads, size_t smem, int* blocks) {
  int limit;
  cudaError_t error = device_attribute(&limit, cudaDevAttrMaxSharedMemoryPerBlockOptin);
  if (error == cudaSuccess) {
    error = cudaFuncSetAttribute(kKernel, cudaFuncAttributeMaxDynamicSharedMemorySize, limit);
  }
  if (error != cudaSuccess) return error;
  return cudaOccupancyMaxActiveBlocksPerMultiprocessor(blocks, kKernel, threads, smem);
}

}  // namespace unipool

#else

#define UNIPOOL_SHARED_ARRAY(T, N, name)          \
  T(&name)                                        \
  [N] = *static_cast<T(*)[N]>(emu::static_shared( \
      [] {                                        \
        static char key;                          \
        return static_cast<const void*>(&key);    \
      }(),                                        \
      sizeof(T[N]), alignof(T)))

namespace unipool {

template <class T>
T* dynamic_shared(size_t count, EMU_SITE) {
  return reinterpret_cast<T*>(emu::dynamic_shared(count * sizeof(T), emu_site));
}

template <class... P, class... A>
cudaError_t launch(void (*kernel)(P...), dim3 grid, dim3 block, size_t smem, cudaStream_t,
                   const A&... args) {
  return emu::launch_kernel(kernel, grid, block, smem, P(args)...);
}

// An H100, but for its multiprocessors: few, so that the blocks of a persistent grid get several
// tiles each.
inline cudaError_t device_attribute(int* value, cudaDeviceAttr attribute) {
  switch (attribute) {
    case cudaDevAttrMultiProcessorCount:
      *value = 5;
      return cudaSuccess;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
      *value = 232448;
      return cudaSuccess;
    case cudaDevAttrComputeCapabilityMajor:
      *value = 9;
      return cudaSuccess;
    case cudaDevAttrComputeCapabilityMinor:
      *value = 0;
      return cudaSuccess;
    default:
      return cudaErrorInvalidValue;
  }
}

template <auto kKernel>
cudaError_t resident_blocks(int /*threads*/, size_t /*smem*/, int* blocks) {
  *blocks = 1;
  return cudaSuccess;
}

}  // namespace unipool

#endif
