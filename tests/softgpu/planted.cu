// SPDX-License-Identifier: Apache-2.0
// Kernels to plant faults with, and calls that C++ would make of the runtime; see planted.py.
#include <cuda_runtime.h>

#define CALL extern "C" __attribute__((visibility("default"))) int

__global__ void fill(int* to, int n, int value) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < n) to[i] = value;
}

__global__ void copy(const int* from, int* to, int n) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < n) to[i] = from[i];
}

__global__ void add(int* to, const int* from, int n) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < n) to[i] += from[i];
}

// 4 KiB of static shared memory, and any of dynamic.
__global__ void shared(int* to) {
  __shared__ int fixed[1024];
  extern __shared__ int dynamic[];
  fixed[threadIdx.x] = dynamic[threadIdx.x] = int(threadIdx.x);
  __syncthreads();
  to[threadIdx.x] = fixed[threadIdx.x ^ 1] + dynamic[threadIdx.x ^ 1];
}

__global__ void __launch_bounds__(64) bounded(int* to) { to[threadIdx.x] = 1; }

// More than 64 registers, so that 1,024 threads have not room.
__global__ void greedy(float* to, int n) {
  float v[100];
#pragma unroll
  for (int i = 0; i < 100; ++i) v[i] = to[i * n];
  for (int k = 0; k < n; ++k) {
#pragma unroll
    for (int i = 0; i < 100; ++i) v[i] = v[i] * v[(i + 7) % 100] + to[k];
  }
#pragma unroll
  for (int i = 0; i < 100; ++i) to[i * n] = v[i];
}

struct Large {
  int values[2000];
};
__global__ void large(Large all, int* to) { to[threadIdx.x] = all.values[1999 - threadIdx.x]; }

namespace {

const void* const kKernels[] = {
    reinterpret_cast<const void*>(fill),    reinterpret_cast<const void*>(copy),
    reinterpret_cast<const void*>(add),     reinterpret_cast<const void*>(shared),
    reinterpret_cast<const void*>(bounded), reinterpret_cast<const void*>(greedy),
    reinterpret_cast<const void*>(large),
};
int not_a_kernel;

}  // namespace

CALL plant_launch(int kernel, const unsigned* grid, const unsigned* block, size_t smem,
                  cudaStream_t stream, void** args) {
  return cudaLaunchKernel(kernel < 0 ? &not_a_kernel : kKernels[kernel],
                          dim3(grid[0], grid[1], grid[2]), dim3(block[0], block[1], block[2]), args,
                          smem, stream);
}
CALL plant_dynamic_limit(int kernel, int bytes) {
  return cudaFuncSetAttribute(kKernels[kernel], cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
}
CALL plant_occupancy(int kernel, int threads, size_t smem, int* blocks) {
  return cudaOccupancyMaxActiveBlocksPerMultiprocessor(blocks, kKernels[kernel], threads, smem);
}
// Registers, static shared memory, threads, capability of the code, of its PTX.
CALL plant_attributes(int kernel, int* facts) {
  cudaFuncAttributes a;
  const int error = cudaFuncGetAttributes(&a, kKernels[kernel]);
  facts[0] = a.numRegs;
  facts[1] = int(a.sharedSizeBytes);
  facts[2] = a.maxThreadsPerBlock;
  facts[3] = a.binaryVersion;
  facts[4] = a.ptxVersion;
  return error;
}
