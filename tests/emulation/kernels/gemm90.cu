// SPDX-License-Identifier: Apache-2.0
#include "gemm90.cuh"

// fault: 0 none, else a planted one (gemm90.cuh)
extern "C" int sample_gemm90(int fault, const void* A, const void* B, int M, int N, int K, float* D,
                             cudaStream_t s) {
  switch (fault) {
    case 0:
      return gemm90::run<0>(A, B, M, N, K, D, s);
    case 1:
      return gemm90::run<1>(A, B, M, N, K, D, s);
    case 2:
      return gemm90::run<2>(A, B, M, N, K, D, s);
    case 3:
      return gemm90::run<3>(A, B, M, N, K, D, s);
  }
  return cudaErrorInvalidValue;
}
