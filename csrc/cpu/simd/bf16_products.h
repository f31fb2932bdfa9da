// SPDX-License-Identifier: Apache-2.0
// Products of bfloat16 matrices with few rows, on processors with dot-product instructions for
// them (AVX512-BF16). All accumulate in float32, take any size, and stream the large operand from
// memory once, in the order in which it lies.
#pragma once

#include <cstdint>

#include "cpu/simd/loops.h"

namespace unipool::cpu {

struct Bf16Products {
  // c [rows, n] = x [rows, k] w [n, k]^T
  void (*nt)(int64_t rows, int64_t n, int64_t k, const bf16* x, int64_t ldx, const bf16* w,
             int64_t ldw, float* c, int64_t ldc);

  // c [rows, n] = x [rows, k] w [k, n]
  void (*nn)(int64_t rows, int64_t n, int64_t k, const bf16* x, int64_t ldx, const bf16* w,
             int64_t ldw, float* c, int64_t ldc);

  // out [n, k] = g^T x over `count` rows, given as pointers, added to what is there if `add`;
  // scratch: tn_scratch(count, n, k) elements
  void (*tn)(int64_t count, int64_t n, int64_t k, const bf16* const* g, const bf16* const* x,
             bf16* scratch, float* out, int64_t ldo, bool add);
  // The same, rounded to bfloat16.
  void (*tn_round)(int64_t count, int64_t n, int64_t k, const bf16* const* g, const bf16* const* x,
                   bf16* scratch, bf16* out, int64_t ldo);

  int64_t (*tn_scratch)(int64_t count, int64_t n, int64_t k);
};

// Null where the processor has no such instructions, or also has AMX tiles, which oneDNN's products
// use.
const Bf16Products* bf16_products();

}  // namespace unipool::cpu
