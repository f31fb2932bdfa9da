// SPDX-License-Identifier: Apache-2.0
// Fused routers: scores of a token's logits, top-k, load and importance; and their backward.
// T tokens, M experts (<= kExpertLimit), k experts per token (<= kTopKLimit, <= M). All tensors are
// contiguous. Every output is written, for T = 0 too. Sums over tokens have a fixed order that
// depends on the shape only.
#pragma once
#include <cuda_runtime_api.h>

#include "unipool/limits.h"
#include "unipool/types.h"

namespace unipool {

struct RouterArgs {
  const void* logits;   // [T, M] dtype
  const float* bias;    // [M], added to the scores for the choice only; may be null
  const uint8_t* mask;  // [M], what is not 0 hides an expert; may be null
  float* weights;       // [T, k]
  int32_t* experts;     // [T, k], -1 in slots without an expert
  int32_t* load;        // [M]
  float* importance;    // [M]
  void* workspace;      // router_workspace_bytes
  int64_t tokens;
  int num_experts;
  int top_k;
  DType dtype;
};

struct RouterBwdArgs {
  const float* grad_weights;     // [T, k]; may be null
  const float* grad_importance;  // [M]; may be null
  const void* logits;            // [T, M] dtype
  const int32_t* experts;        // [T, k]
  const uint8_t* mask;           // [M]; may be null
  void* grad_logits;             // [T, M] dtype
  void* workspace;               // router_bwd_workspace_bytes; norm_topk_bwd only
  int64_t tokens;
  int num_experts;
  int top_k;
  DType dtype;
};

// s = scale * calibration * relu(z / (||z||_2 + eps))
struct NormTopkArgs {
  RouterArgs router;
  const float* scale;  // [1]
  float calibration;
  float eps;
};

struct NormTopkBwdArgs {
  RouterBwdArgs router;
  const float* scale;  // [1]
  float* grad_scale;   // [1]
  float calibration;
  float eps;
};

// p = softmax(z); with renormalize, the weights of a token are divided by their sum
struct SoftmaxTopkArgs {
  RouterArgs router;
  bool renormalize;
};

struct SoftmaxTopkBwdArgs {
  RouterBwdArgs router;
  bool renormalize;
};

size_t router_workspace_bytes(int64_t tokens, int num_experts);
size_t router_bwd_workspace_bytes(int64_t tokens);

cudaError_t launch_norm_topk(const NormTopkArgs& args, cudaStream_t stream);
cudaError_t launch_norm_topk_bwd(const NormTopkBwdArgs& args, cudaStream_t stream);
cudaError_t launch_softmax_topk(const SoftmaxTopkArgs& args, cudaStream_t stream);
cudaError_t launch_softmax_topk_bwd(const SoftmaxTopkBwdArgs& args, cudaStream_t stream);

}  // namespace unipool
