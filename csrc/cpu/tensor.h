// SPDX-License-Identifier: Apache-2.0
// Tensors as the CPU backend sees them: by element type, and by address.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/BFloat16.h>

#ifdef __linux__
#include <sys/mman.h>
#endif

#include <cstdint>
#include <type_traits>

#include "cpu/simd/loops.h"

namespace unipool::cpu {

// Tag of an element type, for generic lambdas: `using T = typename decltype(tag)::type`.
template <class T>
struct Type {
  using type = T;
};

// f(Type<T>) for the T of a dtype that check_<op> has let through.
template <class F>
auto for_dtype(at::ScalarType dtype, F f) {
  switch (dtype) {
    case at::kDouble:
      return f(Type<double>());
    case at::kBFloat16:
      return f(Type<bf16>());
    default:
      return f(Type<float>());
  }
}

template <class T>
using torch_t = std::conditional_t<std::is_same_v<T, bf16>, at::BFloat16, T>;

template <class T>
const T* data(const at::Tensor& t) {
  return reinterpret_cast<const T*>(t.const_data_ptr<torch_t<T>>());
}

template <class T>
T* mutable_data(at::Tensor& t) {
  return reinterpret_cast<T*>(t.mutable_data_ptr<torch_t<T>>());
}

// Asks for large pages under a tensor that is about to be written for the first time: the gradient
// of a pool is hundreds of MB, and faulting it in 4 KiB at a time takes as long as computing it.
inline void advise_large_pages([[maybe_unused]] const at::Tensor& t) {
#ifdef __linux__
  constexpr uintptr_t kLargePage = 2 << 20;
  const auto begin = reinterpret_cast<uintptr_t>(t.const_data_ptr());
  const uintptr_t first = (begin + kLargePage - 1) / kLargePage * kLargePage;
  const uintptr_t last = (begin + t.nbytes()) / kLargePage * kLargePage;
  if (first < last) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#endif
}

}  // namespace unipool::cpu
