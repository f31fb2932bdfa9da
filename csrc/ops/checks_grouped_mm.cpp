// SPDX-License-Identifier: Apache-2.0
#include <ATen/ops/empty.h>
#include <c10/util/Exception.h>

#include "ops/checker.h"
#include "ops/checks.h"

namespace unipool {
namespace {

// b [M, n, K] and offsets [M + 1] of a grouped product whose other operand has `rows` rows.
void check_group_weights(const Checker& check, const char* name, const at::Tensor& rows,
                         const at::Tensor& b, const at::Tensor& offsets) {
  check.shape(name, rows, "[N, *]", {kAny, kAny});
  check.floating(name, rows);
  check.rows("N", rows.size(0));
  check.shape("b", b, "[M, n, K]", {kAny, kAny, kAny});
  check.at_least_one("b", "row per expert (n)", b.size(1));
  check.at_least_one("b", "column (K)", b.size(2));
  check.same_dtype("b", b, name, rows);
  check.same_device("b", b, name, rows);
  check.experts("b", b.size(0), rows);
  check_index(check, "offsets", offsets, "[M + 1]", {b.size(0) + 1}, name, rows);
}

}  // namespace

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

at::Tensor alloc_grouped_mm(const GroupedShape& s, const at::Tensor& a) {
  return at::empty({s.rows, s.n}, a.options());
}

at::Tensor alloc_grouped_mm_bwd_a(const GroupedShape& s, const at::Tensor& grad) {
  return at::empty({s.rows, s.k}, grad.options());
}

}  // namespace unipool
