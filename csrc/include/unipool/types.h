// SPDX-License-Identifier: Apache-2.0
// What the contract between glue and kernels is written in. No torch here and in the headers
// beside: kernels compile in seconds and run without it.
#pragma once
#include <cstddef>
#include <cstdint>

namespace unipool {

enum class DType { kFloat32, kFloat16, kBFloat16 };

constexpr int kWarp = 32;
constexpr int kVectorBytes = 16;  // the widest load and store

constexpr size_t size_of(DType dtype) { return dtype == DType::kFloat32 ? 4 : 2; }

template <class A, class B>
constexpr auto ceil_div(A a, B b) {
  return (a + b - 1) / b;
}

// Rows of `row_bytes` bytes from `p` on can be accessed `bytes` at a time.
inline bool is_aligned(const void* p, int64_t row_bytes, int bytes = kVectorBytes) {
  return reinterpret_cast<uintptr_t>(p) % bytes == 0 && row_bytes % bytes == 0;
}

}  // namespace unipool
