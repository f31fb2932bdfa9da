// SPDX-License-Identifier: Apache-2.0
// The weight gradient of a pool, over all layers that share it. M experts (<= kExpertLimit); rows
// of expert e of a layer are [offsets[e], offsets[e + 1]), ascending; rows past offsets[M] belong
// to none. All tensors are contiguous; sums are in float32.
#pragma once
#include <cuda_runtime_api.h>

#include "unipool/gemm_tiles.h"
#include "unipool/limits.h"
#include "unipool/types.h"

namespace unipool {

// The rows of one layer: row r of an operand is its row r (its top_k 0) or that of token
// order[r] / top_k.
struct WgradSegment {
  const void* grad;        // [rows, n], or [rows / grad_top_k, n]; dtype
  const void* input;       // [rows, K], or [rows / input_top_k, K]; dtype
  const int32_t* order;    // [rows]; null if neither operand is gathered
  const int32_t* offsets;  // [M + 1]
  int64_t rows;
};

// out[e] (+)= sum over segments and over their rows of e of grad[r]^T input[r]. An expert without
// rows is written as zeros, or not touched where `add` is set.
struct GroupedWgradArgs {
  WgradSegment segments[kWgradSegmentLimit];
  int count;
  int grad_top_k, input_top_k;
  void* out;  // [M, n, K] out_dtype
  bool add;   // only with out_dtype float32
  int64_t n, k;
  int experts;
  DType dtype;      // of grad and input
  DType out_dtype;  // dtype or float32
  void* workspace;  // grouped_wgrad_workspace_bytes
  int tile;
};

// row_bytes: of the longer of an input row and a gradient row
size_t grouped_wgrad_workspace_bytes(int64_t total_rows, int experts, int64_t row_bytes);

cudaError_t launch_grouped_wgrad(const GroupedWgradArgs& args, cudaStream_t stream);

}  // namespace unipool
