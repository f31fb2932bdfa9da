// SPDX-License-Identifier: Apache-2.0
#include <ATen/ops/empty.h>
#include <c10/util/Exception.h>

#include <algorithm>
#include <utility>

#include "ops/checker.h"
#include "ops/checks.h"

namespace unipool {
WgradShape check_grouped_wgrad(at::TensorList grad, at::TensorList input, at::TensorList order,
                               at::TensorList offsets, int64_t grad_top_k, int64_t input_top_k) {
  const Checker check("grouped_wgrad");
  const size_t segments = grad.size();
  check.at_least_one("grad", "segment", static_cast<int64_t>(segments));
  TORCH_CHECK_VALUE(input.size() == segments && offsets.size() == segments,
                    "grouped_wgrad: input and offsets must have one tensor per segment (", segments,
                    "), got ", input.size(), " and ", offsets.size());
  TORCH_CHECK_VALUE(grad_top_k >= 0 && input_top_k >= 0,
                    "grouped_wgrad: grad_top_k and input_top_k must not be negative, got ",
                    grad_top_k, " and ", input_top_k);
  const bool gathered = grad_top_k > 0 || input_top_k > 0;
  TORCH_CHECK_VALUE(order.size() == (gathered ? segments : 0), "grouped_wgrad: order must have ",
                    gathered ? "one tensor per segment" : "none", " where ",
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
    check.slots("N", grad[s].size(0), grad_top_k);
    check.slots("N", input[s].size(0), input_top_k);
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

void check_wgrad_sum(const at::Tensor& sum, const WgradShape& s, at::TensorList grad,
                     at::TensorList input, at::TensorList order, at::TensorList offsets) {
  const Checker check("grouped_wgrad_");
  check.shape("sum", sum, "[M, n, K]", {s.experts, s.n, s.k});
  check.dtype("sum", sum, acc_type(grad[0].scalar_type()));
  check.same_device("sum", sum, "grad[0]", grad[0]);
  TORCH_CHECK_VALUE(sum.is_contiguous(), "grouped_wgrad_: sum must be contiguous, got strides ",
                    sum.strides());
  for (const auto& [name, tensors] : {std::pair<const char*, at::TensorList>("grad", grad),
                                      {"input", input},
                                      {"order", order},
                                      {"offsets", offsets}}) {
    for (const at::Tensor& t : tensors) check.apart("sum", sum, name, t);
  }
}

at::Tensor alloc_grouped_wgrad(const WgradShape& s, at::TensorList grad, at::ScalarType dtype) {
  return at::empty({s.experts, s.n, s.k}, grad[0].options().dtype(dtype));
}

}  // namespace unipool
