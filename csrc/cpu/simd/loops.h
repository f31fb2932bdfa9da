// SPDX-License-Identifier: Apache-2.0
// The inner loops of the CPU backend. loops.inc is compiled once per instruction set
// (CMakeLists.txt) and loops<T>() returns the best table for this processor. No torch here: an
// inline function of another header, compiled for AVX-512, must not end up being the one that the
// linker keeps.
#pragma once

#include <cstdint>

namespace unipool::cpu {

// bfloat16 as its bits; layout-compatible with at::BFloat16.
struct bf16 {
  uint16_t bits;
};

template <class T>
struct AccOf {
  using type = float;
};
template <>
struct AccOf<double> {
  using type = double;
};
template <class T>
using acc_t = typename AccOf<T>::type;

// Choice of one token: the ids and scores of its k experts.
template <class T>
struct RouterRow {
  const T* logits;       // [M]
  int64_t experts;       // M
  int64_t top_k;         // k
  const acc_t<T>* bias;  // [M] or null
  const uint8_t* mask;   // [M] or null, what is not 0 hides an expert
  acc_t<T>* scratch;     // [2 * M]
  acc_t<T>* weights;     // [k] out
  int32_t* ids;          // [k] out, -1 in slots without an expert
  acc_t<T>* importance;  // [M] +=
};

template <class T>
struct RouterRowBwd {
  const T* logits;                  // [M]
  int64_t experts;                  // M
  int64_t top_k;                    // k
  const uint8_t* mask;              // [M] or null
  const int32_t* ids;               // [k]
  const acc_t<T>* grad_weights;     // [k] or null
  const acc_t<T>* grad_importance;  // [M] or null
  acc_t<T>* scratch;                // [2 * M]
  T* grad_logits;                   // [M] out
};

template <class T>
struct Loops {
  using acc = acc_t<T>;

  // --- routers; coef = sigma * c
  void (*norm_topk)(const RouterRow<T>& row, acc coef, acc eps);
  // Returns the row's share of d loss / d coef.
  acc (*norm_topk_bwd)(const RouterRowBwd<T>& row, acc coef, acc eps);
  void (*softmax_topk)(const RouterRow<T>& row, bool renormalize);
  void (*softmax_topk_bwd)(const RouterRowBwd<T>& row, bool renormalize);

  // --- rows
  // sum[i] += weight * x[i]
  void (*axpy)(acc weight, const T* x, acc* sum, int64_t n);
  acc (*dot)(const T* a, const T* b, int64_t n);
  // y[i] = scale * x[i], rounded to T
  void (*store)(acc scale, const acc* x, T* y, int64_t n);
  void (*widen)(const T* x, acc* y, int64_t n);

  // --- operands of a tile product (gemm.h), from row pointers
  // out[j * ld + r] = rows[r][j] for j in [0, n), zero for r in [count, ld).
  void (*transpose)(const T* const* rows, int64_t count, int64_t n, acc* out, int64_t ld);
  // The same without a conversion (bfloat16 only).
  void (*transpose_narrow)(const T* const* rows, int64_t count, int64_t n, T* out, int64_t ld);
  // The same in pairs (bfloat16 only, n even): out[j / 2 * 2 * ld + 2 * r + j % 2] = rows[r][j].
  void (*transpose_pairs)(const T* const* rows, int64_t count, int64_t n, T* out, int64_t ld);
  // Pairs of rows (bfloat16 only): out[r / 2 * 2 * n + 2 * j + r % 2] = rows[r][j]; an odd last row
  // is paired with zeros.
  void (*interleave)(const T* const* rows, int64_t count, int64_t n, T* out);

  // --- results of a tile product
  // rows[r][column + j] = scale[r] * tile[j * ld + r] for r in [0, count), j in [0, n); scale may
  // be null.
  void (*store_transposed)(const acc* tile, int64_t ld, int64_t count, int64_t n, const acc* scale,
                           T* const* rows, int64_t column);
  // One row of pre-activations: kept as T (unless preact_gate is null), and hidden = silu(gate) *
  // up.
  void (*swiglu)(const acc* gate, const acc* up, T* preact_gate, T* preact_up, T* hidden,
                 int64_t n);
  // One row: from d loss / d (silu(gate) * up) before the router weight, `grad`, to the gradients
  // of the pre-activations and the weighted hidden row; returns <grad, silu(gate) * up>.
  acc (*swiglu_bwd)(const acc* grad, const T* gate, const T* up, acc weight, T* grad_gate,
                    T* grad_up, T* hidden, int64_t n);
};

template <class T>
const Loops<T>& loops();

}  // namespace unipool::cpu
