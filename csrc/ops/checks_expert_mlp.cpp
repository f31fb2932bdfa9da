// SPDX-License-Identifier: Apache-2.0
#include <ATen/ops/empty.h>
#include <c10/util/Exception.h>

#include "ops/checker.h"
#include "ops/checks.h"

namespace unipool {
namespace {

// The pool's weights and the plan, against tokens of width D in `x` (named `x_name`).
ExpertShape check_pool_and_plan(const Checker& check, const char* x_name, const at::Tensor& x,
                                const at::Tensor& weights, const at::Tensor& gate_up,
                                const at::Tensor& down, const at::Tensor& order,
                                const at::Tensor& inverse, const at::Tensor& offsets) {
  check.shape(x_name, x, "[T, D]", {kAny, kAny});
  check.floating(x_name, x);
  check.shape("gate_up", gate_up, "[M, 2F, D]", {kAny, kAny, x.size(1)});
  TORCH_CHECK_VALUE(gate_up.size(1) % 2 == 0, check.op(),
                    ": gate_up must have an even number of rows per expert (gate rows, then up "
                    "rows), got ",
                    gate_up.size(1));
  check.experts("gate_up", gate_up.size(0), x);
  check.at_least_one("gate_up", "row per expert (2F)", gate_up.size(1));
  check.at_least_one(x_name, "column (D)", x.size(1));
  const ExpertShape shape{x.size(0), inverse.dim() == 2 ? inverse.size(1) : 0, gate_up.size(0),
                          x.size(1), gate_up.size(1) / 2};
  check.shape("down", down, "[M, D, F]", {shape.experts, shape.d_model, shape.d_ff});
  check.same_dtype("gate_up", gate_up, x_name, x);
  check.same_dtype("down", down, x_name, x);
  check.same_device("gate_up", gate_up, x_name, x);
  check.same_device("down", down, x_name, x);
  check_index(check, "inverse", inverse, "[T, k]", {shape.tokens, kAny}, x_name, x);
  check.at_least_one("inverse", "slot per token (k)", shape.top_k);
  check.rows("T * k", shape.rows());
  check_index(check, "order", order, "[T * k]", {shape.rows()}, x_name, x);
  check_index(check, "offsets", offsets, "[M + 1]", {shape.experts + 1}, x_name, x);
  check_router_weights(check, weights, shape.tokens, shape.top_k, x_name, x);
  return shape;
}

}  // namespace

ExpertShape check_expert_mlp(const at::Tensor& x, const at::Tensor& weights,
                             const at::Tensor& gate_up, const at::Tensor& down,
                             const at::Tensor& order, const at::Tensor& inverse,
                             const at::Tensor& offsets) {
  return check_pool_and_plan(Checker("expert_mlp"), "x", x, weights, gate_up, down, order, inverse,
                             offsets);
}

namespace {

ExpertShape check_mlp_bwd(const Checker& check, const at::Tensor& grad, const at::Tensor& weights,
                          const at::Tensor& gate_up, const at::Tensor& down,
                          const at::Tensor& order, const at::Tensor& inverse,
                          const at::Tensor& offsets, const at::Tensor& preact) {
  const auto shape =
      check_pool_and_plan(check, "grad", grad, weights, gate_up, down, order, inverse, offsets);
  check.shape("preact", preact, "[T * k, 2F]", {shape.rows(), 2 * shape.d_ff});
  check.same_dtype("preact", preact, "grad", grad);
  check.same_device("preact", preact, "grad", grad);
  return shape;
}

}  // namespace

ExpertShape check_expert_mlp_bwd(const at::Tensor& grad, const at::Tensor& weights,
                                 const at::Tensor& gate_up, const at::Tensor& down,
                                 const at::Tensor& order, const at::Tensor& inverse,
                                 const at::Tensor& offsets, const at::Tensor& preact) {
  return check_mlp_bwd(Checker("expert_mlp_bwd"), grad, weights, gate_up, down, order, inverse,
                       offsets, preact);
}

ExpertShape check_expert_mlp_bwd_(const at::Tensor& grad, const at::Tensor& weights,
                                  const at::Tensor& gate_up, const at::Tensor& down,
                                  const at::Tensor& order, const at::Tensor& inverse,
                                  const at::Tensor& offsets, const at::Tensor& preact) {
  const auto shape = check_mlp_bwd(Checker("expert_mlp_bwd_"), grad, weights, gate_up, down, order,
                                   inverse, offsets, preact);
  TORCH_CHECK_VALUE(preact.is_contiguous(),
                    "expert_mlp_bwd_: preact must be contiguous, got strides ", preact.strides());
  const Checker check("expert_mlp_bwd_");
  check.apart("preact", preact, "grad", grad);
  check.apart("preact", preact, "weights", weights);
  check.apart("preact", preact, "gate_up", gate_up);
  check.apart("preact", preact, "down", down);
  check.apart("preact", preact, "order", order);
  check.apart("preact", preact, "inverse", inverse);
  check.apart("preact", preact, "offsets", offsets);
  return shape;
}

ExpertOutputs alloc_expert_mlp(const ExpertShape& s, const at::Tensor& x, bool keep_preact) {
  return {at::empty({s.tokens, s.d_model}, x.options()),
          at::empty({keep_preact ? s.rows() : 0, 2 * s.d_ff}, x.options())};
}

ExpertGrads alloc_expert_mlp_bwd(const ExpertShape& s, const at::Tensor& grad,
                                 const at::Tensor& weights, const OptionalTensor& grad_preact) {
  return {at::empty({s.tokens, s.d_model}, grad.options()),
          at::empty({s.tokens, s.top_k}, weights.options()),
          grad_preact ? *grad_preact : at::empty({s.rows(), 2 * s.d_ff}, grad.options()),
          at::empty({s.rows(), s.d_ff}, grad.options())};
}

}  // namespace unipool
