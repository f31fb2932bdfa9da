// SPDX-License-Identifier: Apache-2.0
// The expert MLP over sorted rows. T tokens, k slots per token, N = T * k sorted rows (dispatch.h),
// M experts (<= kExpertLimit), D = d_model, F = d_ff. Rows of expert e are [offsets[e], offsets[e +
// 1]); rows past offsets[M] belong to none and are written as zeros. All tensors are contiguous;
// products accumulate in float32.
#pragma once
#include <cuda_runtime_api.h>

#include "unipool/gemm_tiles.h"
#include "unipool/limits.h"
#include "unipool/types.h"

namespace unipool {

// hidden[r] = silu(gate) * up with gate, up = x[order[r] / top_k] gate_up[e]^T
struct ExpertUpArgs {
  const void* x;           // [T, D] dtype
  const void* gate_up;     // [M, 2F, D] dtype, gate rows first
  const int32_t* order;    // [N]
  const int32_t* offsets;  // [M + 1]
  void* preact;            // [N, 2F] dtype, gate columns first; null if not kept
  void* hidden;            // [N, F] dtype
  int64_t rows, d_model, d_ff;
  int experts, top_k;
  DType dtype;
  int tile;
};

// y = weights[order[r]] * hidden[r] down[e]^T, to row order[r] if top_k is 1 (rows of dropped
// tokens are zeros), else to row r.
struct ExpertDownArgs {
  const void* hidden;      // [N, F] dtype
  const void* down;        // [M, D, F] dtype
  const float* weights;    // [T, k]
  const int32_t* order;    // [N]
  const int32_t* inverse;  // [T, k]
  const int32_t* offsets;  // [M + 1]
  void* out;               // [T, D] if top_k is 1, else [N, D]; dtype
  int64_t rows, d_model, d_ff;
  int experts, top_k;
  DType dtype;
  int tile;
};

// With g = grad[order[r] / top_k] down[e], a = silu(gate) * up and w = weights[order[r]]:
// grad_weights[order[r]] = <g, a> (0 for a dropped slot), hidden[r] = w * a, and grad_preact[r] the
// gradient of preact[r] under w * g.
struct ExpertHiddenBwdArgs {
  const void* grad;        // [T, D] dtype
  const void* down;        // [M, D, F] dtype
  const float* weights;    // [T, k]
  const int32_t* order;    // [N]
  const int32_t* inverse;  // [T, k]
  const int32_t* offsets;  // [M + 1]
  const void* preact;      // [N, 2F] dtype
  void* grad_preact;       // [N, 2F] dtype; may be preact itself
  void* hidden;            // [N, F] dtype
  float* grad_weights;     // [T, k]
  void* workspace;         // expert_hidden_bwd_workspace_bytes: <g, a> of each tile of F
  int64_t rows, d_model, d_ff;
  int experts, top_k;
  DType dtype;
  int tile;
};

// grad_x = grad_preact[r] gate_up[e], to row order[r] if top_k is 1 (zeros for dropped tokens),
// else to row r.
struct ExpertInputBwdArgs {
  const void* grad_preact;  // [N, 2F] dtype
  const void* gate_up;      // [M, 2F, D] dtype
  const int32_t* order;     // [N]
  const int32_t* inverse;   // [T, k]
  const int32_t* offsets;   // [M + 1]
  void* out;                // [T, D] if top_k is 1, else [N, D]; dtype
  int64_t rows, d_model, d_ff;
  int experts, top_k;
  DType dtype;
  int tile;
};

size_t expert_hidden_bwd_workspace_bytes(int64_t rows, int64_t d_ff);

cudaError_t launch_expert_up(const ExpertUpArgs& args, cudaStream_t stream);
cudaError_t launch_expert_down(const ExpertDownArgs& args, cudaStream_t stream);
cudaError_t launch_expert_hidden_bwd(const ExpertHiddenBwdArgs& args, cudaStream_t stream);
cudaError_t launch_expert_input_bwd(const ExpertInputBwdArgs& args, cudaStream_t stream);

}  // namespace unipool
