// SPDX-License-Identifier: Apache-2.0
// norm_topk and softmax_topk on CUDA: check, allocate, launch.
#include <torch/library.h>

#include <tuple>

#include "cuda/op.h"
#include "unipool/router.h"

namespace unipool::cuda {
namespace {

using RouterResult = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

RouterArgs router_args(const char* op, LaunchScope& scope, const RouterShape& s,
                       const at::Tensor& logits, const OptionalTensor& bias,
                       const OptionalTensor& mask, const RouterOutputs& out) {
  const int experts = static_cast<int>(s.experts);
  return {scope.data(logits),
          scope.data<float>(bias),
          scope.data<uint8_t>(mask),
          scope.mutable_data<float>(out.weights),
          scope.mutable_data<int32_t>(out.experts),
          scope.mutable_data<int32_t>(out.load),
          scope.mutable_data<float>(out.importance),
          scope.workspace(router_workspace_bytes(s.tokens, experts), logits),
          s.tokens,
          experts,
          static_cast<int>(s.top_k),
          dtype_of(op, logits)};
}

RouterBwdArgs router_bwd_args(const char* op, LaunchScope& scope, const RouterShape& s,
                              const OptionalTensor& grad_weights,
                              const OptionalTensor& grad_importance, const at::Tensor& logits,
                              const at::Tensor& experts, const OptionalTensor& mask,
                              const at::Tensor& grad_logits) {
  return {scope.data<float>(grad_weights),
          scope.data<float>(grad_importance),
          scope.data(logits),
          scope.data<int32_t>(experts),
          scope.data<uint8_t>(mask),
          scope.mutable_data(grad_logits),
          scope.workspace(router_bwd_workspace_bytes(s.tokens), logits),
          s.tokens,
          static_cast<int>(s.experts),
          static_cast<int>(s.top_k),
          dtype_of(op, logits)};
}

RouterResult norm_topk(const at::Tensor& logits_in, const at::Tensor& scale, int64_t top_k,
                       double calibration, double eps, const OptionalTensor& bias_in,
                       const OptionalTensor& mask_in) {
  const auto shape = check_norm_topk(logits_in, scale, top_k, calibration, eps, bias_in, mask_in);
  LaunchScope scope(logits_in);
  UNIPOOL_NVTX_RANGE("norm_topk");
  const auto logits = logits_in.contiguous();
  const auto bias = contiguous(bias_in), mask = contiguous(mask_in);
  const auto out = alloc_router(shape, logits);
  scope.run(launch_norm_topk,
            NormTopkArgs{router_args("norm_topk", scope, shape, logits, bias, mask, out),
                         scope.data<float>(scale), static_cast<float>(calibration),
                         static_cast<float>(eps)});
  return {out.weights, out.experts, out.load, out.importance};
}

std::tuple<at::Tensor, at::Tensor> norm_topk_bwd(const OptionalTensor& grad_weights_in,
                                                 const OptionalTensor& grad_importance_in,
                                                 const at::Tensor& logits_in,
                                                 const at::Tensor& scale,
                                                 const at::Tensor& experts_in, double calibration,
                                                 double eps, const OptionalTensor& mask_in) {
  const auto shape = check_norm_topk_bwd(grad_weights_in, grad_importance_in, logits_in, scale,
                                         experts_in, calibration, eps, mask_in);
  LaunchScope scope(logits_in);
  UNIPOOL_NVTX_RANGE("norm_topk_bwd");
  const auto logits = logits_in.contiguous(), experts = experts_in.contiguous();
  const auto grad_weights = contiguous(grad_weights_in), mask = contiguous(mask_in);
  const auto grad_importance = contiguous(grad_importance_in);
  const auto grad_logits = alloc_grad_logits(shape, logits), grad_scale = alloc_grad_scale(scale);
  scope.run(launch_norm_topk_bwd,
            NormTopkBwdArgs{router_bwd_args("norm_topk_bwd", scope, shape, grad_weights,
                                            grad_importance, logits, experts, mask, grad_logits),
                            scope.data<float>(scale), scope.mutable_data<float>(grad_scale),
                            static_cast<float>(calibration), static_cast<float>(eps)});
  return {grad_logits, grad_scale};
}

RouterResult softmax_topk(const at::Tensor& logits_in, int64_t top_k, bool renormalize,
                          const OptionalTensor& bias_in, const OptionalTensor& mask_in) {
  const auto shape = check_softmax_topk(logits_in, top_k, renormalize, bias_in, mask_in);
  LaunchScope scope(logits_in);
  UNIPOOL_NVTX_RANGE("softmax_topk");
  const auto logits = logits_in.contiguous();
  const auto bias = contiguous(bias_in), mask = contiguous(mask_in);
  const auto out = alloc_router(shape, logits);
  scope.run(launch_softmax_topk,
            SoftmaxTopkArgs{router_args("softmax_topk", scope, shape, logits, bias, mask, out),
                            renormalize});
  return {out.weights, out.experts, out.load, out.importance};
}

at::Tensor softmax_topk_bwd(const OptionalTensor& grad_weights_in,
                            const OptionalTensor& grad_importance_in, const at::Tensor& logits_in,
                            const at::Tensor& experts_in, bool renormalize,
                            const OptionalTensor& mask_in) {
  const auto shape = check_softmax_topk_bwd(grad_weights_in, grad_importance_in, logits_in,
                                            experts_in, renormalize, mask_in);
  LaunchScope scope(logits_in);
  UNIPOOL_NVTX_RANGE("softmax_topk_bwd");
  const auto logits = logits_in.contiguous(), experts = experts_in.contiguous();
  const auto grad_weights = contiguous(grad_weights_in), mask = contiguous(mask_in);
  const auto grad_importance = contiguous(grad_importance_in);
  const auto grad_logits = alloc_grad_logits(shape, logits);
  scope.run(launch_softmax_topk_bwd,
            SoftmaxTopkBwdArgs{router_bwd_args("softmax_topk_bwd", scope, shape, grad_weights,
                                               grad_importance, logits, experts, mask, grad_logits),
                               renormalize});
  return grad_logits;
}

}  // namespace
}  // namespace unipool::cuda

TORCH_LIBRARY_IMPL(unipool, CUDA, m) {
  m.impl("norm_topk", &unipool::cuda::norm_topk);
  m.impl("norm_topk_bwd", &unipool::cuda::norm_topk_bwd);
  m.impl("softmax_topk", &unipool::cuda::softmax_topk);
  m.impl("softmax_topk_bwd", &unipool::cuda::softmax_topk_bwd);
}
