// SPDX-License-Identifier: Apache-2.0
// What check_<op> is written in: each failure is one line that starts with the op's name.
#pragma once
#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>

#include <algorithm>
#include <initializer_list>
#include <limits>
#include <string>
#include <utility>

#include "unipool/limits.h"

namespace unipool {

inline constexpr int64_t kMaxRows = std::numeric_limits<int32_t>::max();  // order and offsets

const char* dtype_name(at::ScalarType dtype);

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
    TORCH_CHECK_VALUE(count <= kExpertLimit, op_, ": ", name, " must have at most ", kExpertLimit,
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
    TORCH_CHECK_VALUE(top_k <= kTopKLimit, op_, ": top_k must be at most ", kTopKLimit, ", got ",
                      top_k);
  }

  void rows(const char* what, int64_t rows) const {
    TORCH_CHECK_VALUE(rows <= kMaxRows, op_, ": ", what, " must be below 2^31, got ", rows);
  }

  // tokens * top_k slots, of a top_k that may be anything: `what` is its formula.
  void slots(const char* what, int64_t tokens, int64_t top_k) const {
    TORCH_CHECK_VALUE(tokens == 0 || top_k <= kMaxRows / tokens, op_, ": ", what,
                      " must be below 2^31, got ", tokens, " * ", top_k);
  }

  // An op writes `out` while it reads `in`: their memory must not overlap.
  void apart(const char* out_name, const at::Tensor& out, const char* in_name,
             const at::Tensor& in) const {
    const auto [begin, end] = extent(out);
    const auto [other_begin, other_end] = extent(in);
    TORCH_CHECK_VALUE(end <= other_begin || other_end <= begin, op_, ": ", out_name,
                      ", which is written, must not share memory with ", in_name);
  }

  void at_least_one(const char* name, const char* what, int64_t size) const {
    TORCH_CHECK_VALUE(size >= 1, op_, ": ", name, " must have at least one ", what, ", got 0");
  }

  const char* op() const { return op_; }

  static constexpr int64_t kAny = -1;

 private:
  // First byte and end of what a tensor's elements span; equal if it has none.
  static std::pair<uintptr_t, uintptr_t> extent(const at::Tensor& t) {
    const auto begin = reinterpret_cast<uintptr_t>(t.const_data_ptr());
    if (t.numel() == 0) return {begin, begin};
    int64_t last = 0;
    for (int64_t axis = 0; axis < t.dim(); ++axis) last += (t.size(axis) - 1) * t.stride(axis);
    return {begin, begin + (last + 1) * t.element_size()};
  }

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

// An int32 tensor such as offsets, on the device of `other`.
void check_index(const Checker& check, const char* name, const at::Tensor& t, const char* letters,
                 std::initializer_list<int64_t> expected, const char* other_name,
                 const at::Tensor& other);
// weights [T, k] in the acc type of `other`.
void check_router_weights(const Checker& check, const at::Tensor& weights, int64_t tokens,
                          int64_t top_k, const char* other_name, const at::Tensor& other);

}  // namespace unipool
