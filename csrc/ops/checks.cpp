// SPDX-License-Identifier: Apache-2.0
#include "ops/checks.h"

#include <c10/util/Exception.h>

#include "ops/checker.h"

namespace unipool {

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

at::ScalarType acc_type(at::ScalarType dtype) {
  return dtype == at::kDouble ? at::kDouble : at::kFloat;
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
