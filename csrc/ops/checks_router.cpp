// SPDX-License-Identifier: Apache-2.0
#include <ATen/ops/empty.h>
#include <c10/util/Exception.h>

#include <limits>

#include "ops/checker.h"
#include "ops/checks.h"

namespace unipool {
namespace {

RouterShape check_logits(const Checker& check, const at::Tensor& logits, int64_t top_k,
                         const OptionalTensor& bias, const OptionalTensor& mask) {
  check.shape("logits", logits, "[T, M]", {kAny, kAny});
  check.floating("logits", logits);
  check.at_least_one("logits", "expert (M)", logits.size(1));
  check.top_k(top_k, logits.size(1));
  check.slots("T * top_k", logits.size(0), top_k);
  if (!logits.is_cpu()) {
    TORCH_CHECK_VALUE(logits.size(1) <= kExpertLimit, check.op(), ": M must be at most ",
                      kExpertLimit, " on ", logits.device(), ", got ", logits.size(1));
  }
  if (bias) {
    check.shape("bias", *bias, "[M]", {logits.size(1)});
    check.dtype("bias", *bias, acc_type(logits.scalar_type()));
    check.same_device("bias", *bias, "logits", logits);
  }
  if (mask) {
    check.shape("mask", *mask, "[M]", {logits.size(1)});
    check.dtype("mask", *mask, at::kBool);
    check.same_device("mask", *mask, "logits", logits);
  }
  return {logits.size(0), logits.size(1), top_k};
}

void check_scale(const Checker& check, const at::Tensor& logits, const at::Tensor& scale,
                 double calibration, double eps) {
  TORCH_CHECK_VALUE(scale.numel() == 1, check.op(), ": scale must have one element, got ",
                    scale.sizes());
  check.dtype("scale", scale, acc_type(logits.scalar_type()));
  check.same_device("scale", scale, "logits", logits);
  TORCH_CHECK_VALUE(eps > 0 && eps <= std::numeric_limits<double>::max(), check.op(),
                    ": eps must be positive and finite, got ", eps);
  TORCH_CHECK_VALUE(calibration > 0 && calibration <= std::numeric_limits<double>::max(),
                    check.op(), ": calibration must be positive and finite, got ", calibration);
}

RouterShape check_router_bwd(const Checker& check, const OptionalTensor& grad_weights,
                             const OptionalTensor& grad_importance, const at::Tensor& logits,
                             const at::Tensor& experts, const OptionalTensor& mask) {
  check.shape("experts", experts, "[T, k]", {kAny, kAny});
  check.dtype("experts", experts, at::kInt);
  check.same_device("experts", experts, "logits", logits);
  const auto shape = check_logits(check, logits, experts.size(1), std::nullopt, mask);
  check.shape("experts", experts, "[T, k]", {shape.tokens, shape.top_k});
  const auto acc = acc_type(logits.scalar_type());
  if (grad_weights) {
    check.shape("grad_weights", *grad_weights, "[T, k]", {shape.tokens, shape.top_k});
    check.dtype("grad_weights", *grad_weights, acc);
    check.same_device("grad_weights", *grad_weights, "logits", logits);
  }
  if (grad_importance) {
    check.shape("grad_importance", *grad_importance, "[M]", {shape.experts});
    check.dtype("grad_importance", *grad_importance, acc);
    check.same_device("grad_importance", *grad_importance, "logits", logits);
  }
  return shape;
}

}  // namespace

RouterShape check_norm_topk(const at::Tensor& logits, const at::Tensor& scale, int64_t top_k,
                            double calibration, double eps, const OptionalTensor& bias,
                            const OptionalTensor& mask) {
  const Checker check("norm_topk");
  const auto shape = check_logits(check, logits, top_k, bias, mask);
  check_scale(check, logits, scale, calibration, eps);
  return shape;
}

RouterShape check_softmax_topk(const at::Tensor& logits, int64_t top_k, bool renormalize,
                               const OptionalTensor& bias, const OptionalTensor& mask) {
  const auto shape = check_logits(Checker("softmax_topk"), logits, top_k, bias, mask);
  TORCH_CHECK_VALUE(!renormalize || top_k > 1,
                    "softmax_topk: renormalize must be False for top_k=1, got True: every weight "
                    "would be 1 and the router would get no gradient from the task");
  return shape;
}

RouterShape check_norm_topk_bwd(const OptionalTensor& grad_weights,
                                const OptionalTensor& grad_importance, const at::Tensor& logits,
                                const at::Tensor& scale, const at::Tensor& experts,
                                double calibration, double eps, const OptionalTensor& mask) {
  const Checker check("norm_topk_bwd");
  const auto shape = check_router_bwd(check, grad_weights, grad_importance, logits, experts, mask);
  check_scale(check, logits, scale, calibration, eps);
  return shape;
}

RouterShape check_softmax_topk_bwd(const OptionalTensor& grad_weights,
                                   const OptionalTensor& grad_importance, const at::Tensor& logits,
                                   const at::Tensor& experts, bool renormalize,
                                   const OptionalTensor& mask) {
  const Checker check("softmax_topk_bwd");
  const auto shape = check_router_bwd(check, grad_weights, grad_importance, logits, experts, mask);
  TORCH_CHECK_VALUE(!renormalize || shape.top_k > 1,
                    "softmax_topk_bwd: renormalize must be False for top_k=1, got True");
  return shape;
}

RouterOutputs alloc_router(const RouterShape& s, const at::Tensor& logits) {
  const auto acc = logits.options().dtype(acc_type(logits.scalar_type()));
  const auto index = logits.options().dtype(at::kInt);
  return {at::empty({s.tokens, s.top_k}, acc), at::empty({s.tokens, s.top_k}, index),
          at::empty({s.experts}, index), at::empty({s.experts}, acc)};
}

at::Tensor alloc_grad_logits(const RouterShape& s, const at::Tensor& logits) {
  return at::empty({s.tokens, s.experts}, logits.options());
}

at::Tensor alloc_grad_scale(const at::Tensor& scale) {
  return at::empty(scale.sizes(), scale.options());
}

}  // namespace unipool
