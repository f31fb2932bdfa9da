// SPDX-License-Identifier: Apache-2.0
// The three products of the expert loops, on the few rows that one expert has. Each streams the
// expert's weights once, in place where the kernel allows it, and keeps everything else in cache:
//
//   nt   c [R, n] = x [R, k] w [n, k]^T     forward
//   nn   c [R, n] = x [R, k] w [k, n]       input gradient
//   tn   out [n, k] = g [R, n]^T x [R, k]   weight gradient
//
// All matrices are row-major; c is acc_t. A products object belongs to a thread and holds its
// scratch memory.
//
// DotProducts    bfloat16, by own loops (AVX512-BF16)
// TileProducts   any dtype, by oneDNN's brgemm where the processor has it, else by ATen's matmul:
//                float32 or float64 (WideTiles; bfloat16 is converted block by block), or bfloat16
//                in pairs of rows (PairTiles)
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <vector>

#include "cpu/simd/bf16_products.h"
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

// Scratch memory that only grows; values are undefined after get.
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

inline int64_t round_up(int64_t n, int64_t multiple) {
  return (n + multiple - 1) / multiple * multiple;
}

template <class T>
const T* gather(const T* const* rows, int64_t count, int64_t k, Scratch<T>& scratch) {
  T* out = scratch.get(count * k);
  for (int64_t r = 0; r < count; ++r) std::memcpy(out + r * k, rows[r], k * sizeof(T));
  return out;
}

// --- operands of brgemm

// A row-major operand, packed as its kernel wants it.
template <class P>
struct Operand {
  const P* data;
  int64_t ld;
};

// Operands are built from a block of a tensor (a, b: first element and row stride), from gathered
// rows (b_gathered: row pointers), or from the transpose of gathered rows (a_transposed [n, count],
// b_transposed [n, ld], zero-padded beyond count).
// Every operand that is built with k = count rows spans padded_k(count).
template <class T>
struct WideTiles {
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
  static Operand<Acc> b_gathered(const T* const* rows, int64_t k, int64_t n,
                                 Scratch<Acc>& scratch) {
    Acc* out = scratch.get(k * n);
    for (int64_t i = 0; i < k; ++i) loops<T>().widen(rows[i], out + i * n, n);
    return {out, n};
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
  static void run(int64_t m, int64_t n, int64_t k, Operand<Acc> a, Operand<Acc> b, Acc* c,
                  int64_t ldc, bool add) {
    product(m, n, k, a.data, a.ld, b.data, b.ld, c, ldc, add);
  }
};

struct PairTiles {
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
  static void run(int64_t m, int64_t n, int64_t k, Operand<bf16> a, Operand<bf16> b, float* c,
                  int64_t ldc, bool add) {
    product_pairs(m, n, k, a.data, a.ld, b.data, b.ld, c, ldc, add);
  }
};

// --- products

// nt is computed transposed, w [n, k] as it lies times x^T, whose columns are padded to kLane; nn
// directly, in blocks of w that are read in order: no weight is ever transposed.
template <class Tiles>
class TileProducts {
 public:
  using Element = typename Tiles::Element;
  using Acc = typename Tiles::Acc;
  static constexpr int64_t kSlab = 512;  // rows of `out` that a task of tn takes

  // x of the next calls of nt, from row pointers.
  void rows_nt(const Element* const* rows, int64_t count, int64_t k) {
    count_ = count;
    k_ = k;
    x_ = Tiles::b_transposed(rows, count, k, round_up(count, kLane), rows_);
  }

  // x of the next calls of nn: rows that lie ld apart.
  void rows_nn(const Element* x, int64_t ld, int64_t count, int64_t k) {
    count_ = count;
    k_ = k;
    x_ = Tiles::a(x, ld, count, k, rows_);
  }
  void rows_nn(const Element* const* rows, int64_t count, int64_t k) {
    rows_nn(gather(rows, count, k, gathered_), k, count, k);
  }

  void nt(const Element* w, int64_t ldw, int64_t n, Acc* c, int64_t ldc) {
    Acc* tile = tile_.get(kTile * x_.ld);
    targets_.resize(count_);
    for (int64_t r = 0; r < count_; ++r) targets_[r] = c + r * ldc;
    for (int64_t j = 0; j < n; j += kTile) {
      const int64_t height = std::min(kTile, n - j);
      const auto block = Tiles::a(w + j * ldw, ldw, height, k_, weights_);
      Tiles::run(height, x_.ld, k_, block, x_, tile, x_.ld, false);
      loops<Acc>().store_transposed(tile, x_.ld, count_, height, nullptr, targets_.data(), j);
    }
  }

  void nn(const Element* w, int64_t ldw, int64_t n, Acc* c, int64_t ldc) {
    for (int64_t j = 0; j < n; j += kWide) {
      const int64_t width = std::min(kWide, n - j);
      for (int64_t i = 0; i < k_; i += kWide) {
        const int64_t depth = std::min(kWide, k_ - i);
        const auto b = Tiles::b(w + i * ldw + j, ldw, depth, width, weights_);
        Tiles::run(count_, width, depth, {x_.data + i, x_.ld}, b, c + j, ldc, i > 0);
      }
    }
  }

  // Out is Acc or Element; `add` needs Acc.
  template <class Out>
  void tn(const Element* const* g, const Element* const* x, int64_t count, int64_t n, int64_t k,
          Out* out, bool add) {
    Acc* sum;
    if constexpr (std::is_same_v<Out, Acc>) {
      sum = out;
    } else {
      sum = tile_.get(n * k);
    }
    for (int64_t at = 0; at < count; at += kDepth) {
      const int64_t depth = std::min(kDepth, count - at);
      const auto b = Tiles::b_gathered(x + at, depth, k, rows_);
      const auto a = Tiles::a_transposed(g + at, depth, n, weights_);
      for (int64_t j = 0; j < n; j += kTile) {
        Tiles::run(std::min(kTile, n - j), k, Tiles::padded_k(depth), {a.data + j * a.ld, a.ld}, b,
                   sum + j * k, k, add || at > 0);
      }
    }
    if constexpr (!std::is_same_v<Out, Acc>) loops<Element>().store(1, sum, out, n * k);
  }

 private:
  static constexpr int64_t kLane = 16;
  static constexpr int64_t kTile = 64;    // rows of w (nt) or of out (tn) in a product
  static constexpr int64_t kWide = 256;   // columns and depth of a block of w (nn)
  static constexpr int64_t kDepth = 256;  // rows that tn takes at a time

  int64_t count_ = 0;
  int64_t k_ = 0;
  Operand<typename Tiles::Packed> x_{};
  Scratch<Element> gathered_;
  Scratch<typename Tiles::Packed> rows_;
  Scratch<typename Tiles::Packed> weights_;
  Scratch<Acc> tile_;
  std::vector<Acc*> targets_;
  ProductScope scope_;
};

class DotProducts {
 public:
  using Element = bf16;
  using Acc = float;
  static constexpr int64_t kSlab = 256;

  void rows_nt(const bf16* const* rows, int64_t count, int64_t k) { rows_nn(rows, count, k); }
  void rows_nn(const bf16* x, int64_t ld, int64_t count, int64_t k) {
    x_ = {x, ld};
    count_ = count;
    k_ = k;
  }
  void rows_nn(const bf16* const* rows, int64_t count, int64_t k) {
    rows_nn(gather(rows, count, k, rows_), k, count, k);
  }

  void nt(const bf16* w, int64_t ldw, int64_t n, float* c, int64_t ldc) {
    products_.nt(count_, n, k_, x_.data, x_.ld, w, ldw, c, ldc);
  }
  void nn(const bf16* w, int64_t ldw, int64_t n, float* c, int64_t ldc) {
    products_.nn(count_, n, k_, x_.data, x_.ld, w, ldw, c, ldc);
  }

  void tn(const bf16* const* g, const bf16* const* x, int64_t count, int64_t n, int64_t k,
          float* out, bool add) {
    bf16* scratch = packed_.get(products_.tn_scratch(std::min(count, kDepth), n, k));
    for (int64_t at = 0; at < count; at += kDepth) {
      products_.tn(std::min(kDepth, count - at), n, k, g + at, x + at, scratch, out, k,
                   add || at > 0);
    }
  }
  void tn(const bf16* const* g, const bf16* const* x, int64_t count, int64_t n, int64_t k,
          bf16* out, bool) {
    if (count <= kDepth) {
      products_.tn_round(count, n, k, g, x, packed_.get(products_.tn_scratch(count, n, k)), out, k);
      return;
    }
    float* sum = sum_.get(n * k);
    tn(g, x, count, n, k, sum, false);
    loops<bf16>().store(1, sum, out, n * k);
  }

 private:
  static constexpr int64_t kDepth = 320;  // rows that tn takes at a time

  const Bf16Products& products_ = *bf16_products();
  Operand<bf16> x_{};
  int64_t count_ = 0;
  int64_t k_ = 0;
  Scratch<bf16> rows_;
  Scratch<bf16> packed_;
  Scratch<float> sum_;
};

}  // namespace unipool::cpu
