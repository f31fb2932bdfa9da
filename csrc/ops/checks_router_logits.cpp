// SPDX-License-Identifier: Apache-2.0
#include <ATen/ops/empty.h>
#include <c10/util/Exception.h>

#include "ops/checker.h"
#include "ops/checks.h"

namespace unipool {
namespace {

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

}  // namespace

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

at::Tensor alloc_router_logits(const LogitsShape& s, const at::Tensor& x) {
  return at::empty({s.tokens, s.experts}, x.options().dtype(acc_type(x.scalar_type())));
}

}  // namespace unipool
