// SPDX-License-Identifier: Apache-2.0
// Rows times the matrix of their expert. N sorted rows (dispatch.h), M experts (<= kExpertLimit);
// rows of expert e are [offsets[e], offsets[e + 1]), rows past offsets[M] belong to none and are
// written as zeros. All tensors are contiguous; products accumulate in float32.
#pragma once
#include <cuda_runtime_api.h>

#include "unipool/gemm_tiles.h"
#include "unipool/limits.h"
#include "unipool/types.h"

namespace unipool {

// out[r] = a[r] b[e]^T; as its backward out[r] = a[r] b[e].
struct GroupedMmArgs {
  const void* a;           // [N, K] dtype; backward: [N, n]
  const void* b;           // [M, n, K] dtype
  const int32_t* offsets;  // [M + 1]
  void* out;               // [N, n] dtype; backward: [N, K]
  int64_t rows, n, k;
  int experts;
  DType dtype;
  int tile;  // of gemm_tiles(), kAutoTile to choose
};

cudaError_t launch_grouped_mm(const GroupedMmArgs& args, cudaStream_t stream);
cudaError_t launch_grouped_mm_bwd_a(const GroupedMmArgs& args, cudaStream_t stream);

}  // namespace unipool
