// SPDX-License-Identifier: Apache-2.0
// Products of rows with the experts of a pool. T tokens, k slots a token, N = T * k sorted rows
// (dispatch.h), M experts (<= kExpertLimit), D = d_model, F = d_ff. Rows of expert e are
// [offsets[e], offsets[e + 1]); rows past offsets[M] belong to none and are written as zeros. All
// tensors are contiguous; products accumulate in float32.
#pragma once
#include <cuda_runtime_api.h>

#include "unipool/gemm_tiles.h"
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

// 5 KiB of kernel parameters; more than 4 KiB need CUDA 12.1.
constexpr int kMaxWgradSegments = 128;

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
  WgradSegment segments[kMaxWgradSegments];
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

size_t expert_hidden_bwd_workspace_bytes(int64_t rows, int64_t d_ff);
// row_bytes: of the longer of an input row and a gradient row
size_t grouped_wgrad_workspace_bytes(int64_t total_rows, int experts, int64_t row_bytes);

cudaError_t launch_grouped_mm(const GroupedMmArgs& args, cudaStream_t stream);
cudaError_t launch_grouped_mm_bwd_a(const GroupedMmArgs& args, cudaStream_t stream);
cudaError_t launch_grouped_wgrad(const GroupedWgradArgs& args, cudaStream_t stream);
cudaError_t launch_expert_up(const ExpertUpArgs& args, cudaStream_t stream);
cudaError_t launch_expert_down(const ExpertDownArgs& args, cudaStream_t stream);
cudaError_t launch_expert_hidden_bwd(const ExpertHiddenBwdArgs& args, cudaStream_t stream);
cudaError_t launch_expert_input_bwd(const ExpertInputBwdArgs& args, cudaStream_t stream);

}  // namespace unipool
