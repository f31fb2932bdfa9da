// SPDX-License-Identifier: Apache-2.0
// Sorting token slots by expert, and moving rows between token order and sorted order.
// T tokens, k slots per token, N = T * k < 2^31 slots and sorted rows, M experts (<= kExpertLimit),
// D = width. A slot is token * k + j. All tensors are contiguous; every output is written.
#pragma once
#include <cuda_runtime_api.h>

#include "unipool/limits.h"
#include "unipool/types.h"

namespace unipool {

// Slots run through the segments (layers) in order. Ids outside [0, M) are dropped.
struct DispatchPlanArgs {
  const int32_t* experts[kPlanSegmentLimit];  // ids of each segment
  int32_t slots[kPlanSegmentLimit];           // number of ids in each segment
  int segments;
  int num_experts;
  int32_t* order;    // [N]: slot of each sorted row, -1 past offsets[M]
  int32_t* inverse;  // [N]: sorted row of each slot, -1 for a dropped one
  int32_t* offsets;  // [M + 1]
  void* workspace;   // dispatch_plan_workspace_bytes
};

// y[r] = x[order[r] / top_k]; zero where order[r] is no slot. Bytes are moved as they are, two at
// least.
struct PermuteArgs {
  const void* x;         // [T, row_bytes]
  const int32_t* order;  // [N]
  void* y;               // [N, row_bytes]
  int64_t rows;
  int64_t row_bytes;
  int top_k;
};

// out[t] = sum_j weights[t, j] * y[inverse[t, j]], in slot order, float32 accumulation
struct UnpermuteArgs {
  const void* y;           // [N, D] dtype
  const int32_t* inverse;  // [T, k]
  const float* weights;    // [T, k]; null for a plain sum
  void* out;               // [T, D] dtype
  int64_t tokens;
  int64_t width;
  int top_k;
  DType dtype;
};

// grad_y[inverse[t, j]] = weights[t, j] * grad[t]; grad_weights[t, j] = <grad[t], y[inverse[t, j]]>
struct UnpermuteBwdArgs {
  const void* grad;        // [T, D] dtype
  const void* y;           // [N, D] dtype
  const int32_t* order;    // [N]
  const int32_t* inverse;  // [T, k]
  const float* weights;    // [T, k]
  void* grad_y;            // [N, D] dtype, zero in rows that hold no slot
  float* grad_weights;     // [T, k], zero for a dropped slot
  int64_t tokens;
  int64_t width;
  int top_k;
  DType dtype;
};

size_t dispatch_plan_workspace_bytes(int64_t slots, int num_experts);

cudaError_t launch_dispatch_plan(const DispatchPlanArgs& args, cudaStream_t stream);
cudaError_t launch_permute(const PermuteArgs& args, cudaStream_t stream);
cudaError_t launch_unpermute(const UnpermuteArgs& args, cudaStream_t stream);
cudaError_t launch_unpermute_bwd(const UnpermuteBwdArgs& args, cudaStream_t stream);

}  // namespace unipool
