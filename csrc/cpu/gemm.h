// SPDX-License-Identifier: Apache-2.0
// Small dense products for the expert loops: C [m, n] (+)= A [m, k] B [k, n], row-major,
// accumulated and returned in acc_t. An expert sees few rows, so the loops stream its weights once
// as either operand, in place where the kernel allows it, and keep everything else in cache.
//
// Two kernels: AccKernel multiplies in float32 or float64 (bfloat16 is converted block by block),
// PairsKernel uses bfloat16 dot products (B in pairs of rows, even k). The products are oneDNN's
// brgemm where the processor has it, else ATen's.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>
#include <vector>

#include "cpu/simd/loops.h"

namespace unipool::cpu {

bool has_pairs_product();  // brgemm takes bfloat16 on this processor

void product(int64_t m, int64_t n, int64_t k, const float* a, int64_t lda, const float* b,
             int64_t ldb, float* c, int64_t ldc, bool add);
void product(int64_t m, int64_t n, int64_t k, const double* a, int64_t lda, const double* b,
             int64_t ldb, double* c, int64_t ldc, bool add);
// b in pairs of rows (loops.h: interleave), ldb in pairs; only where has_pairs_product().
void product_pairs(int64_t m, int64_t n, int64_t k, const bf16* a, int64_t lda, const bf16* b,
                   int64_t ldb, float* c, int64_t ldc, bool add);

// Returns what the products of a thread hold of the processor (AMX tiles); one at the end of its
// work.
class ProductScope {
 public:
  ProductScope() = default;
  ProductScope(const ProductScope&) = delete;
  ProductScope& operator=(const ProductScope&) = delete;
  ~ProductScope();
};

// Scratch memory that only grows; values are undefined after resize.
template <class T>
class Scratch {
 public:
  T* get(int64_t size) {
    if (static_cast<int64_t>(data_.size()) < size) data_.resize(size);
    return data_.data();
  }

 private:
  std::vector<T> data_;
};

// A row-major operand, packed as its kernel wants it.
template <class P>
struct Operand {
  const P* data;
  int64_t ld;
};

inline int64_t round_up(int64_t n, int64_t multiple) {
  return (n + multiple - 1) / multiple * multiple;
}

// Operands are built from a block of a tensor (a, b: first element and row stride), from gathered
// rows (a_gathered, b_gathered: row pointers), or from the transpose of gathered rows
// (a_transposed [n, count], b_transposed [n, ld], zero-padded beyond count).
// Every operand that is built with k = count rows spans padded_k(count).
template <class T>
struct AccKernel {
  using Element = T;
  using Acc = acc_t<T>;
  using Packed = Acc;
  static constexpr bool kInPlace = std::is_same_v<T, Acc>;

  static int64_t padded_k(int64_t k) { return k; }

  static Operand<Acc> a(const T* x, int64_t ld, int64_t m, int64_t k, Scratch<Acc>& scratch) {
    if constexpr (kInPlace) {
      return {x, ld};
    } else {
      Acc* out = scratch.get(m * k);
      for (int64_t i = 0; i < m; ++i) loops<T>().widen(x + i * ld, out + i * k, k);
      return {out, k};
    }
  }
  static Operand<Acc> b(const T* x, int64_t ld, int64_t k, int64_t n, Scratch<Acc>& scratch) {
    return a(x, ld, k, n, scratch);
  }
  static Operand<Acc> a_gathered(const T* const* rows, int64_t m, int64_t k,
                                 Scratch<Acc>& scratch) {
    Acc* out = scratch.get(m * k);
    for (int64_t i = 0; i < m; ++i) loops<T>().widen(rows[i], out + i * k, k);
    return {out, k};
  }
  static Operand<Acc> b_gathered(const T* const* rows, int64_t k, int64_t n,
                                 Scratch<Acc>& scratch) {
    return a_gathered(rows, k, n, scratch);
  }
  static Operand<Acc> a_transposed(const T* const* rows, int64_t count, int64_t n,
                                   Scratch<Acc>& scratch) {
    return b_transposed(rows, count, n, count, scratch);
  }
  static Operand<Acc> b_transposed(const T* const* rows, int64_t count, int64_t n, int64_t ld,
                                   Scratch<Acc>& scratch) {
    Acc* out = scratch.get(n * ld);
    loops<T>().transpose(rows, count, n, out, ld);
    return {out, ld};
  }

  // silu(gate) * up [n, ld] -> rows [f, f + n) of the packed B [F, ld] at `b`.
  static void swiglu_into(const Acc* gate, const Acc* up, int64_t n, int64_t ld, Acc* b,
                          int64_t f) {
    loops<T>().swiglu(gate, up, n, ld, b + f * ld);
  }

  static void run(int64_t m, int64_t n, int64_t k, Operand<Acc> a, Operand<Acc> b, Acc* c,
                  int64_t ldc, bool add) {
    product(m, n, k, a.data, a.ld, b.data, b.ld, c, ldc, add);
  }
};

struct PairsKernel {
  using Element = bf16;
  using Acc = float;
  using Packed = bf16;

  static int64_t padded_k(int64_t k) { return round_up(k, 2); }

  static Operand<bf16> a(const bf16* x, int64_t ld, int64_t, int64_t, Scratch<bf16>&) {
    return {x, ld};
  }
  static Operand<bf16> b(const bf16* x, int64_t ld, int64_t k, int64_t n, Scratch<bf16>& scratch) {
    std::vector<const bf16*> rows(k);
    for (int64_t i = 0; i < k; ++i) rows[i] = x + i * ld;
    return b_gathered(rows.data(), k, n, scratch);
  }
  static Operand<bf16> a_gathered(const bf16* const* rows, int64_t m, int64_t k,
                                  Scratch<bf16>& scratch) {
    bf16* out = scratch.get(m * k);
    for (int64_t i = 0; i < m; ++i) std::memcpy(out + i * k, rows[i], k * sizeof(bf16));
    return {out, k};
  }
  static Operand<bf16> b_gathered(const bf16* const* rows, int64_t k, int64_t n,
                                  Scratch<bf16>& scratch) {
    bf16* out = scratch.get(padded_k(k) * n);
    loops<bf16>().interleave(rows, k, n, out);
    return {out, n};
  }
  static Operand<bf16> a_transposed(const bf16* const* rows, int64_t count, int64_t n,
                                    Scratch<bf16>& scratch) {
    const int64_t ld = padded_k(count);
    bf16* out = scratch.get(n * ld);
    loops<bf16>().transpose_narrow(rows, count, n, out, ld);
    return {out, ld};
  }
  static Operand<bf16> b_transposed(const bf16* const* rows, int64_t count, int64_t n, int64_t ld,
                                    Scratch<bf16>& scratch) {
    bf16* out = scratch.get(n * ld);
    loops<bf16>().transpose_pairs(rows, count, n, out, ld);
    return {out, ld};
  }
  static void swiglu_into(const float* gate, const float* up, int64_t n, int64_t ld, bf16* b,
                          int64_t f) {
    loops<bf16>().swiglu_pairs(gate, up, n, ld, b + f * ld);
  }
  static void run(int64_t m, int64_t n, int64_t k, Operand<bf16> a, Operand<bf16> b, float* c,
                  int64_t ldc, bool add) {
    product_pairs(m, n, k, a.data, a.ld, b.data, b.ld, c, ldc, add);
  }
};

}  // namespace unipool::cpu
