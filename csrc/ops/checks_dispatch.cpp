// SPDX-License-Identifier: Apache-2.0
#include <ATen/ops/empty.h>
#include <c10/util/Exception.h>

#include <string>

#include "ops/checker.h"
#include "ops/checks.h"

namespace unipool {
PlanShape check_dispatch_plan(at::TensorList experts, int64_t num_experts) {
  const Checker check("dispatch_plan");
  check.at_least_one("experts", "layer", static_cast<int64_t>(experts.size()));
  TORCH_CHECK_VALUE(num_experts >= 1, "dispatch_plan: num_experts must be at least 1, got ",
                    num_experts);
  TORCH_CHECK_VALUE(num_experts < kMaxRows, "dispatch_plan: num_experts must be below 2^31, got ",
                    num_experts);
  if (!experts[0].is_cpu()) {
    TORCH_CHECK_VALUE(num_experts <= kExpertLimit, "dispatch_plan: num_experts must be at most ",
                      kExpertLimit, " on ", experts[0].device(), ", got ", num_experts);
  }
  PlanShape shape{0, experts[0].dim() == 2 ? experts[0].size(1) : 0, num_experts};
  for (size_t layer = 0; layer < experts.size(); ++layer) {
    const auto name = experts.size() == 1 ? "experts" : "experts[" + std::to_string(layer) + "]";
    check.shape(name.c_str(), experts[layer], "[T, k]", {kAny, layer == 0 ? kAny : shape.top_k});
    check.dtype(name.c_str(), experts[layer], at::kInt);
    check.same_device(name.c_str(), experts[layer], "experts[0]", experts[0]);
    shape.tokens += experts[layer].size(0);
  }
  check.at_least_one("experts", "slot per token (k)", shape.top_k);
  check.rows("T * k", shape.slots());
  return shape;
}

PlanOutputs alloc_dispatch_plan(const PlanShape& s, const at::Tensor& like) {
  const auto index = like.options().dtype(at::kInt);
  return {at::empty({s.slots()}, index), at::empty({s.tokens, s.top_k}, index),
          at::empty({s.experts + 1}, index)};
}

PermuteShape check_permute(const at::Tensor& x, const at::Tensor& order, int64_t top_k) {
  const Checker check("permute");
  check.shape("x", x, "[T, D]", {kAny, kAny});
  check.floating("x", x);
  TORCH_CHECK_VALUE(top_k >= 1, "permute: top_k must be at least 1, got ", top_k);
  check.slots("T * top_k", x.size(0), top_k);
  check_index(check, "order", order, "[T * top_k]", {x.size(0) * top_k}, "x", x);
  return {x.size(0), order.size(0), x.size(1), top_k};
}

namespace {

PermuteShape check_rows_and_inverse(const Checker& check, const at::Tensor& y,
                                    const at::Tensor& inverse, const OptionalTensor& weights) {
  check.shape("y", y, "[N, D]", {kAny, kAny});
  check.floating("y", y);
  check_index(check, "inverse", inverse, "[T, k]", {kAny, kAny}, "y", y);
  check.at_least_one("inverse", "slot per token (k)", inverse.size(1));
  check.shape("y", y, "[T * k, D]", {inverse.numel(), kAny});
  check.rows("T * k", inverse.numel());
  if (weights) {
    check_router_weights(check, *weights, inverse.size(0), inverse.size(1), "y", y);
  }
  return {inverse.size(0), y.size(0), y.size(1), inverse.size(1)};
}

}  // namespace

PermuteShape check_unpermute(const at::Tensor& y, const at::Tensor& inverse,
                             const OptionalTensor& weights) {
  return check_rows_and_inverse(Checker("unpermute"), y, inverse, weights);
}

PermuteShape check_unpermute_bwd(const at::Tensor& grad, const at::Tensor& y,
                                 const at::Tensor& order, const at::Tensor& inverse,
                                 const at::Tensor& weights) {
  const Checker check("unpermute_bwd");
  const auto shape = check_rows_and_inverse(check, y, inverse, weights);
  check.shape("grad", grad, "[T, D]", {shape.tokens, shape.width});
  check.same_dtype("grad", grad, "y", y);
  check.same_device("grad", grad, "y", y);
  check_index(check, "order", order, "[T * k]", {shape.rows}, "y", y);
  return shape;
}

at::Tensor alloc_permute(const PermuteShape& s, const at::Tensor& x) {
  return at::empty({s.rows, s.width}, x.options());
}

at::Tensor alloc_unpermute(const PermuteShape& s, const at::Tensor& y) {
  return at::empty({s.tokens, s.width}, y.options());
}

UnpermuteGrads alloc_unpermute_bwd(const PermuteShape& s, const at::Tensor& y,
                                   const at::Tensor& weights) {
  return {at::empty({s.rows, s.width}, y.options()),
          at::empty({s.tokens, s.top_k}, weights.options())};
}

}  // namespace unipool
