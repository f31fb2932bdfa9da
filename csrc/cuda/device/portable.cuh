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

}  // namespace unipool

#endif
