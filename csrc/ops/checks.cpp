// SPDX-License-Identifier: Apache-2.0
#include "ops/checks.h"

#include <ATen/ops/empty.h>
#include <c10/util/Exception.h>

#include <algorithm>
#include <limits>
#include <string>

namespace unipool {
namespace {

constexpr int64_t kMaxRows = std::numeric_limits<int32_t>::max();  // order and offsets are int32

const char* dtype_name(at::ScalarType dtype) {
  switch (dtype) {
    case at::kFloat:
      return "float32";
    case at::kDouble:
      return "float64";
    case at::kBFloat16:
      return "bfloat16";
    case at::kHalf:
      return "float16";
    case at::kInt:
      return "int32";
    case at::kLong:
      return "int64";
    case at::kBool:
      return "bool";
    default:
      return c10::toString(dtype);
  }
}

// The checks of one op's arguments; each failure is one line that starts with the op's name.
class Checker {
 public:
  explicit Checker(const char* op) : op_(op) {}

  void shape(const char* name, const at::Tensor& t, const char* letters,
             std::initializer_list<int64_t> expected) const {
    bool ok = t.dim() == static_cast<int64_t>(expected.size());
    int64_t axis = 0;
    for (int64_t size : expected) {
      ok = ok && (size == kAny || t.size(axis) == size);
      ++axis;
    }
    TORCH_CHECK_VALUE(ok, op_, ": ", name, " must be ", letters, describe(expected), ", got ",
                      t.sizes());
  }

  void floating(const char* name, const at::Tensor& t) const {
    const auto dtype = t.scalar_type();
    const bool common = dtype == at::kFloat || dtype == at::kBFloat16;
    if (t.is_cpu()) {
      TORCH_CHECK_TYPE(common || dtype == at::kDouble, op_, ": ", name,
                       " must be float32, float64 or bfloat16 on the CPU, got ", dtype_name(dtype));
    } else {
      TORCH_CHECK_TYPE(common || dtype == at::kHalf, op_, ": ", name,
                       " must be float32, bfloat16 or float16 on ", t.device(), ", got ",
                       dtype_name(dtype));
    }
  }

  // `name` has one entry an expert; `like` tells the device.
  void experts(const char* name, int64_t count, const at::Tensor& like) const {
    at_least_one(name, "expert (M)", count);
    if (like.is_cpu()) return;
    TORCH_CHECK_VALUE(count <= kMaxExperts, op_, ": ", name, " must have at most ", kMaxExperts,
                      " experts (M) on ", like.device(), ", got ", count);
  }

  void dtype(const char* name, const at::Tensor& t, at::ScalarType expected) const {
    TORCH_CHECK_TYPE(t.scalar_type() == expected, op_, ": ", name, " must be ",
                     dtype_name(expected), ", got ", dtype_name(t.scalar_type()));
  }

  void same_dtype(const char* name, const at::Tensor& t, const char* other_name,
                  const at::Tensor& other) const {
    TORCH_CHECK_TYPE(t.scalar_type() == other.scalar_type(), op_, ": ", name,
                     " must have the dtype of ", other_name, " (", dtype_name(other.scalar_type()),
                     "), got ", dtype_name(t.scalar_type()));
  }

  void same_device(const char* name, const at::Tensor& t, const char* other_name,
                   const at::Tensor& other) const {
    TORCH_CHECK_VALUE(t.device() == other.device(), op_, ": ", name, " must be on the device of ",
                      other_name, " (", other.device(), "), got ", t.device());
  }

  void top_k(int64_t top_k, int64_t experts) const {
    TORCH_CHECK_VALUE(top_k >= 1 && top_k <= experts, op_, ": top_k must be in [1, M=", experts,
                      "], got ", top_k);
    TORCH_CHECK_VALUE(top_k <= kMaxTopK, op_, ": top_k must be at most ", kMaxTopK, ", got ",
                      top_k);
  }

  void rows(const char* what, int64_t rows) const {
    TORCH_CHECK_VALUE(rows <= kMaxRows, op_, ": ", what, " must be below 2^31, got ", rows);
  }

  void at_least_one(const char* name, const char* what, int64_t size) const {
    TORCH_CHECK_VALUE(size >= 1, op_, ": ", name, " must have at least one ", what, ", got 0");
  }

  const char* op() const { return op_; }

  static constexpr int64_t kAny = -1;

 private:
  // The sizes that are fixed by other arguments, e.g. " = [*, 64]"; nothing if all are free.
  static std::string describe(std::initializer_list<int64_t> expected) {
    if (std::all_of(expected.begin(), expected.end(), [](int64_t s) { return s == kAny; })) {
      return "";
    }
    std::string text = " = [";
    for (int64_t size : expected) {
      if (text.back() != '[') text += ", ";
      text += size == kAny ? "*" : std::to_string(size);
    }
    return text + "]";
  }

  const char* op_;
};

constexpr int64_t kAny = Checker::kAny;

LogitsShape check_projection(const Checker& check, const at::Tensor& x, const at::Tensor& weight) {
  check.shape("x", x, "[T, D]", {kAny, kAny});
  check.floating("x", x);
  check.at_least_one("x", "column (D)", x.size(1));
  check.shape("weight", weight, "[M, D]", {kAny, x.size(1)});
  check.at_least_one("weight", "expert (M)", weight.size(0));
  check.same_dtype("weight", weight, "x", x);
  check.same_device("weight", weight, "x", x);
  return {x.size(0), weight.size(0), x.size(1)};
}

RouterShape check_logits(const Checker& check, const at::Tensor& logits, int64_t top_k,
                         const OptionalTensor& bias, const OptionalTensor& mask) {
  check.shape("logits", logits, "[T, M]", {kAny, kAny});
  check.floating("logits", logits);
  check.at_least_one("logits", "expert (M)", logits.size(1));
  check.top_k(top_k, logits.size(1));
  check.rows("T * top_k", logits.size(0) * top_k);
  if (!logits.is_cpu()) {
    TORCH_CHECK_VALUE(logits.size(1) <= kMaxExperts, check.op(), ": M must be at most ",
                      kMaxExperts, " on ", logits.device(), ", got ", logits.size(1));
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
                 double eps) {
  TORCH_CHECK_VALUE(scale.numel() == 1, check.op(), ": scale must have one element, got ",
                    scale.sizes());
  check.dtype("scale", scale, acc_type(logits.scalar_type()));
  check.same_device("scale", scale, "logits", logits);
  TORCH_CHECK_VALUE(eps > 0 && eps <= std::numeric_limits<double>::max(), check.op(),
                    ": eps must be positive and finite, got ", eps);
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

void check_index(const Checker& check, const char* name, const at::Tensor& t, const char* letters,
                 std::initializer_list<int64_t> expected, const char* other_name,
                 const at::Tensor& other) {
  check.shape(name, t, letters, expected);
  check.dtype(name, t, at::kInt);
  check.same_device(name, t, other_name, other);
}

void check_router_weights(const Checker& check, const at::Tensor& weights, int64_t tokens,
                          int64_t top_k, const char* other_name, const at::Tensor& other) {
  check.shape("weights", weights, "[T, k]", {tokens, top_k});
  check.dtype("weights", weights, acc_type(other.scalar_type()));
  check.same_device("weights", weights, other_name, other);
}

// b [M, n, K] and offsets [M + 1] of a grouped product whose other operand has `rows` rows.
void check_group_weights(const Checker& check, const char* name, const at::Tensor& rows,
                         const at::Tensor& b, const at::Tensor& offsets) {
  check.shape(name, rows, "[N, *]", {kAny, kAny});
  check.floating(name, rows);
  check.rows("N", rows.size(0));
  check.shape("b", b, "[M, n, K]", {kAny, kAny, kAny});
  check.at_least_one("b", "row an expert (n)", b.size(1));
  check.at_least_one("b", "column (K)", b.size(2));
  check.same_dtype("b", b, name, rows);
  check.same_device("b", b, name, rows);
  check.experts("b", b.size(0), rows);
  check_index(check, "offsets", offsets, "[M + 1]", {b.size(0) + 1}, name, rows);
}

// The pool's weights and the plan, against tokens of width D in `x` (named `x_name`).
ExpertShape check_pool_and_plan(const Checker& check, const char* x_name, const at::Tensor& x,
                                const at::Tensor& weights, const at::Tensor& gate_up,
                                const at::Tensor& down, const at::Tensor& order,
                                const at::Tensor& inverse, const at::Tensor& offsets) {
  check.shape(x_name, x, "[T, D]", {kAny, kAny});
  check.floating(x_name, x);
  check.shape("gate_up", gate_up, "[M, 2F, D]", {kAny, kAny, x.size(1)});
  TORCH_CHECK_VALUE(gate_up.size(1) % 2 == 0, check.op(),
                    ": gate_up must have an even number of rows an expert (gate rows, then up "
                    "rows), got ",
                    gate_up.size(1));
  check.experts("gate_up", gate_up.size(0), x);
  check.at_least_one("gate_up", "row an expert (2F)", gate_up.size(1));
  check.at_least_one(x_name, "column (D)", x.size(1));
  const ExpertShape shape{x.size(0), inverse.dim() == 2 ? inverse.size(1) : 0, gate_up.size(0),
                          x.size(1), gate_up.size(1) / 2};
  check.shape("down", down, "[M, D, F]", {shape.experts, shape.d_model, shape.d_ff});
  check.same_dtype("gate_up", gate_up, x_name, x);
  check.same_dtype("down", down, x_name, x);
  check.same_device("gate_up", gate_up, x_name, x);
  check.same_device("down", down, x_name, x);
  check_index(check, "inverse", inverse, "[T, k]", {shape.tokens, kAny}, x_name, x);
  check.at_least_one("inverse", "slot a token (k)", shape.top_k);
  check.rows("T * k", shape.rows());
  check_index(check, "order", order, "[T * k]", {shape.rows()}, x_name, x);
  check_index(check, "offsets", offsets, "[M + 1]", {shape.experts + 1}, x_name, x);
  check_router_weights(check, weights, shape.tokens, shape.top_k, x_name, x);
  return shape;
}

}  // namespace

at::ScalarType acc_type(at::ScalarType dtype) {
  return dtype == at::kDouble ? at::kDouble : at::kFloat;
}

// --- routers

LogitsShape check_router_logits(const at::Tensor& x, const at::Tensor& weight) {
  return check_projection(Checker("router_logits"), x, weight);
}

LogitsShape check_router_logits_bwd(const at::Tensor& grad, const at::Tensor& x,
                                    const at::Tensor& weight) {
  const Checker check("router_logits_bwd");
  const auto shape = check_projection(check, x, weight);
  check.shape("grad", grad, "[T, M]", {shape.tokens, shape.experts});
  check.dtype("grad", grad, acc_type(x.scalar_type()));
  check.same_device("grad", grad, "x", x);
  return shape;
}

RouterShape check_norm_topk(const at::Tensor& logits, const at::Tensor& scale, int64_t top_k,
                            double calibration, double eps, const OptionalTensor& bias,
                            const OptionalTensor& mask) {
  const Checker check("norm_topk");
  const auto shape = check_logits(check, logits, top_k, bias, mask);
  check_scale(check, logits, scale, eps);
  TORCH_CHECK_VALUE(calibration > 0 && calibration <= std::numeric_limits<double>::max(),
                    "norm_topk: calibration must be positive and finite, got ", calibration);
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
                                const at::Tensor& scale, const at::Tensor& experts, double eps,
                                const OptionalTensor& mask) {
  const Checker check("norm_topk_bwd");
  const auto shape = check_router_bwd(check, grad_weights, grad_importance, logits, experts, mask);
  check_scale(check, logits, scale, eps);
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

// --- dispatch

PlanShape check_dispatch_plan(at::TensorList experts, int64_t num_experts) {
  const Checker check("dispatch_plan");
  check.at_least_one("experts", "layer", static_cast<int64_t>(experts.size()));
  TORCH_CHECK_VALUE(num_experts >= 1, "dispatch_plan: num_experts must be at least 1, got ",
                    num_experts);
  TORCH_CHECK_VALUE(num_experts < kMaxRows, "dispatch_plan: num_experts must be below 2^31, got ",
                    num_experts);
  if (!experts[0].is_cpu()) {
    TORCH_CHECK_VALUE(num_experts <= kMaxExperts, "dispatch_plan: num_experts must be at most ",
                      kMaxExperts, " on ", experts[0].device(), ", got ", num_experts);
  }
  PlanShape shape{0, experts[0].dim() == 2 ? experts[0].size(1) : 0, num_experts};
  for (size_t layer = 0; layer < experts.size(); ++layer) {
    const auto name = experts.size() == 1 ? "experts" : "experts[" + std::to_string(layer) + "]";
    check.shape(name.c_str(), experts[layer], "[T, k]", {kAny, layer == 0 ? kAny : shape.top_k});
    check.dtype(name.c_str(), experts[layer], at::kInt);
    check.same_device(name.c_str(), experts[layer], "experts[0]", experts[0]);
    shape.tokens += experts[layer].size(0);
  }
  check.at_least_one("experts", "slot a token (k)", shape.top_k);
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
  check.rows("T * top_k", x.size(0) * top_k);
  check_index(check, "order", order, "[T * top_k]", {x.size(0) * top_k}, "x", x);
  return {x.size(0), order.size(0), x.size(1), top_k};
}

namespace {

PermuteShape check_rows_and_inverse(const Checker& check, const at::Tensor& y,
                                    const at::Tensor& inverse, const OptionalTensor& weights) {
  check.shape("y", y, "[N, D]", {kAny, kAny});
  check.floating("y", y);
  check_index(check, "inverse", inverse, "[T, k]", {kAny, kAny}, "y", y);
  check.at_least_one("inverse", "slot a token (k)", inverse.size(1));
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

// --- experts

GroupedShape check_grouped_mm(const at::Tensor& a, const at::Tensor& b, const at::Tensor& offsets) {
  const Checker check("grouped_mm");
  check_group_weights(check, "a", a, b, offsets);
  check.shape("a", a, "[N, K]", {kAny, b.size(2)});
  return {a.size(0), b.size(0), b.size(1), b.size(2)};
}

GroupedShape check_grouped_mm_bwd_a(const at::Tensor& grad, const at::Tensor& b,
                                    const at::Tensor& offsets) {
  const Checker check("grouped_mm_bwd_a");
  check_group_weights(check, "grad", grad, b, offsets);
  check.shape("grad", grad, "[N, n]", {kAny, b.size(1)});
  return {grad.size(0), b.size(0), b.size(1), b.size(2)};
}

WgradShape check_grouped_wgrad(at::TensorList grad, at::TensorList input, at::TensorList order,
                               at::TensorList offsets, int64_t grad_top_k, int64_t input_top_k) {
  const Checker check("grouped_wgrad");
  const size_t segments = grad.size();
  check.at_least_one("grad", "segment", static_cast<int64_t>(segments));
  TORCH_CHECK_VALUE(input.size() == segments && offsets.size() == segments,
                    "grouped_wgrad: input and offsets must have one tensor a segment (", segments,
                    "), got ", input.size(), " and ", offsets.size());
  TORCH_CHECK_VALUE(grad_top_k >= 0 && input_top_k >= 0,
                    "grouped_wgrad: grad_top_k and input_top_k must not be negative, got ",
                    grad_top_k, " and ", input_top_k);
  const bool gathered = grad_top_k > 0 || input_top_k > 0;
  TORCH_CHECK_VALUE(order.size() == (gathered ? segments : 0), "grouped_wgrad: order must have ",
                    gathered ? "one tensor a segment" : "none", " where ",
                    gathered ? "an operand is" : "no operand is", " gathered, got ", order.size());
  for (size_t s = 0; s < segments; ++s) {
    check.shape("grad", grad[s], "[*, n]", {kAny, s == 0 ? kAny : grad[0].size(1)});
    check.shape("input", input[s], "[*, K]", {kAny, s == 0 ? kAny : input[0].size(1)});
    check.floating("grad", grad[s]);
    check.same_dtype("grad", grad[s], "grad[0]", grad[0]);
    check.same_dtype("input", input[s], "grad[0]", grad[0]);
    check.same_device("grad", grad[s], "grad[0]", grad[0]);
    check.same_device("input", input[s], "grad[0]", grad[0]);
    check.shape("offsets", offsets[s], "[M + 1]", {s == 0 ? kAny : offsets[0].size(0)});
    check_index(check, "offsets", offsets[s], "[M + 1]", {kAny}, "grad[0]", grad[0]);
    TORCH_CHECK_VALUE(offsets[s].size(0) >= 2,
                      "grouped_wgrad: offsets must be [M + 1] with M >= 1, got ",
                      offsets[s].sizes());
    check.experts("offsets", offsets[s].size(0) - 1, grad[0]);
    const int64_t grad_rows = grad[s].size(0) * std::max<int64_t>(grad_top_k, 1);
    const int64_t input_rows = input[s].size(0) * std::max<int64_t>(input_top_k, 1);
    check.at_least_one("grad", "column (n)", grad[s].size(1));
    check.at_least_one("input", "column (K)", input[s].size(1));
    TORCH_CHECK_VALUE(grad_rows == input_rows,
                      "grouped_wgrad: grad and input must have as many "
                      "sorted rows, got ",
                      grad_rows, " and ", input_rows);
    check.rows("N", grad_rows);
    if (gathered) check_index(check, "order", order[s], "[N]", {grad_rows}, "grad[0]", grad[0]);
  }
  return {offsets[0].size(0) - 1, grad[0].size(1), input[0].size(1)};
}

at::ScalarType check_wgrad_dtype(at::TensorList grad, std::optional<at::ScalarType> out_dtype) {
  const auto dtype = grad[0].scalar_type();
  const auto acc = acc_type(dtype);
  const auto out = out_dtype.value_or(dtype);
  TORCH_CHECK_TYPE(out == dtype || out == acc, "grouped_wgrad: out_dtype must be ",
                   dtype_name(dtype), " or ", dtype_name(acc), ", got ", dtype_name(out));
  return out;
}

void check_wgrad_sum(const at::Tensor& sum, const WgradShape& s, at::TensorList grad) {
  const Checker check("grouped_wgrad_");
  check.shape("sum", sum, "[M, n, K]", {s.experts, s.n, s.k});
  check.dtype("sum", sum, acc_type(grad[0].scalar_type()));
  check.same_device("sum", sum, "grad[0]", grad[0]);
  TORCH_CHECK_VALUE(sum.is_contiguous(), "grouped_wgrad_: sum must be contiguous, got strides ",
                    sum.strides());
}

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

// --- values of index tensors

void check_offsets_values(const char* op, const at::Tensor& offsets, int64_t rows) {
  const int32_t* o = offsets.const_data_ptr<int32_t>();
  const int64_t last = offsets.numel() - 1;
  TORCH_CHECK_VALUE(o[0] == 0, op, ": offsets must start at 0, got ", o[0]);
  for (int64_t e = 0; e < last; ++e) {
    TORCH_CHECK_VALUE(o[e] <= o[e + 1], op, ": offsets must ascend, got offsets[", e, "]=", o[e],
                      " > offsets[", e + 1, "]=", o[e + 1]);
  }
  TORCH_CHECK_VALUE(o[last] <= rows, op, ": offsets must end within the N=", rows, " rows, got ",
                    o[last]);
}

void check_index_values(const char* op, const char* name, const at::Tensor& index, int64_t bound) {
  const int32_t* v = index.const_data_ptr<int32_t>();
  const int64_t n = index.numel();
  for (int64_t i = 0; i < n; ++i) {
    TORCH_CHECK_VALUE(v[i] >= -1 && v[i] < bound, op, ": ", name, " must hold values in [-1, ",
                      bound, "), got ", v[i]);
  }
}

void check_order_values(const char* op, const at::Tensor& order, int64_t rows, int64_t valid) {
  const int32_t* v = order.const_data_ptr<int32_t>();
  for (int64_t r = 0; r < valid; ++r) {
    TORCH_CHECK_VALUE(v[r] >= 0 && v[r] < rows, op, ": order must hold slots in [0, ", rows,
                      ") in the first offsets[M]=", valid, " rows, got order[", r, "]=", v[r]);
  }
}

}  // namespace unipool
