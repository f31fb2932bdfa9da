// SPDX-License-Identifier: Apache-2.0
// Router logits with float32 sums, and their gradients. bfloat16 operands are used as they lie
// where the processor multiplies them exactly (AVX512-BF16): a task owns its outputs, so results do
// not depend on the number of threads. All others are converted and left to ATen's matmul.
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/mm.h>
#include <torch/library.h>

#include <algorithm>
#include <tuple>
#include <vector>

#include "cpu/gemm.h"
#include "cpu/parallel.h"
#include "cpu/simd/bf16_products.h"
#include "cpu/simd/loops.h"
#include "cpu/tensor.h"
#include "ops/checks.h"
#include "unipool/nvtx.h"

namespace unipool::cpu {
namespace {

constexpr int64_t kRows = 128;          // tokens of a task
constexpr int64_t kColumns = 256;       // of a task's gradient of x that are in cache at a time
constexpr int64_t kWeightColumns = 64;  // of a task of the gradient of the weight,
constexpr int64_t kDepth = 320;         // and the tokens that it takes at a time

int64_t parts(int64_t size, int64_t step) { return (size + step - 1) / step; }

bool has_bf16_products(const at::Tensor& x) {
  return x.scalar_type() == at::kBFloat16 && bf16_products() != nullptr;
}

// The out variant, as autocast would narrow the operands of at::mm.
at::Tensor acc_product(const at::Tensor& a, const at::Tensor& b) {
  auto out = at::empty({a.size(0), b.size(1)}, a.options());
  return at::mm_out(out, a, b);
}

// --- forward

void logits_of_bf16(const LogitsShape& s, const bf16* x, const bf16* weight, float* out) {
  const Bf16Products& products = *bf16_products();
  parallel_tasks(parts(s.tokens, kRows), s.flops(), [&] {
    return [&](int64_t i) {
      const int64_t first = i * kRows;
      products.nt(std::min(kRows, s.tokens - first), s.experts, s.width, x + first * s.width,
                  s.width, weight, s.width, out + first * s.experts, s.experts);
    };
  });
}

at::Tensor router_logits(const at::Tensor& x, const at::Tensor& weight) {
  UNIPOOL_NVTX_RANGE("router_logits");
  const auto s = check_router_logits(x, weight);
  const auto acc = acc_type(x.scalar_type());
  if (!has_bf16_products(x)) return acc_product(x.to(acc), weight.to(acc).t());
  auto out = alloc_router_logits(s, x);
  logits_of_bf16(s, data<bf16>(x.contiguous()), data<bf16>(weight.contiguous()),
                 mutable_data<float>(out));
  return out;
}

// --- backward: float32 gradients as sums of two bfloat16 numbers, exact to 2^-17

// One row of gradients [n] -> [hi | lo], hi = round(g) and lo = round(g - hi); lo is 0 where hi is
// not finite: NaN and infinity are told by hi alone.
void split_row(const float* grad, int64_t n, bf16* out, float* rest) {
  loops<bf16>().store(1, grad, out, n);
  loops<bf16>().widen(out, rest, n);
  for (int64_t j = 0; j < n; ++j) {
    const float low = grad[j] - rest[j];
    rest[j] = low - low == 0 ? low : 0.0f;
  }
  loops<bf16>().store(1, rest, out + n, n);
}

// split [T, 2 M] out, and grad_x [T, D] = split [T, 2 M] times [weight; weight] [2 M, D].
void grad_x_of_bf16(const LogitsShape& s, const float* grad, const bf16* weight_twice, bf16* split,
                    bf16* grad_x) {
  const Bf16Products& products = *bf16_products();
  const int64_t depth = 2 * s.experts;
  parallel_tasks(parts(s.tokens, kRows), 2 * s.flops(), [&] {
    return [&, rest = Scratch<float>(), scratch = Scratch<float>()](int64_t i) mutable {
      const int64_t first = i * kRows;
      const int64_t rows = std::min(kRows, s.tokens - first);
      for (int64_t r = first; r < first + rows; ++r) {
        split_row(grad + r * s.experts, s.experts, split + r * depth, rest.get(s.experts));
      }
      float* tile = scratch.get(rows * kColumns);
      for (int64_t j = 0; j < s.width; j += kColumns) {
        const int64_t width = std::min(kColumns, s.width - j);
        products.nn(rows, width, depth, split + first * depth, depth, weight_twice + j, s.width,
                    tile, kColumns);
        for (int64_t r = 0; r < rows; ++r) {
          loops<bf16>().store(1, tile + r * kColumns, grad_x + (first + r) * s.width + j, width);
        }
      }
    };
  });
}

// grad_weight [M, D] = hi^T x + lo^T x
void grad_weight_of_bf16(const LogitsShape& s, const bf16* split, const bf16* x,
                         bf16* grad_weight) {
  const Bf16Products& products = *bf16_products();
  const int64_t n = 2 * s.experts;
  parallel_tasks(parts(s.width, kWeightColumns), 2 * s.flops(), [&] {
    return [&, packed = Scratch<bf16>(), sums = Scratch<float>(),
            grad_rows = std::vector<const bf16*>(kDepth),
            x_rows = std::vector<const bf16*>(kDepth)](int64_t i) mutable {
      const int64_t first = i * kWeightColumns;
      const int64_t width = std::min(kWeightColumns, s.width - first);
      float* sum = sums.get(n * width);
      for (int64_t at = 0; at == 0 || at < s.tokens; at += kDepth) {
        const int64_t count = std::min(kDepth, s.tokens - at);
        for (int64_t r = 0; r < count; ++r) {
          grad_rows[r] = split + (at + r) * n;
          x_rows[r] = x + (at + r) * s.width + first;
        }
        products.tn(count, n, width, grad_rows.data(), x_rows.data(),
                    packed.get(products.tn_scratch(count, n, width)), sum, width, at > 0);
      }
      for (int64_t e = 0; e < s.experts; ++e) {
        float* high = sum + e * width;
        const float* low = sum + (s.experts + e) * width;
        for (int64_t j = 0; j < width; ++j) high[j] += low[j];
        loops<bf16>().store(1, high, grad_weight + e * s.width + first, width);
      }
    };
  });
}

std::tuple<at::Tensor, at::Tensor> router_logits_bwd(const at::Tensor& grad_in,
                                                     const at::Tensor& x_in,
                                                     const at::Tensor& weight_in) {
  UNIPOOL_NVTX_RANGE("router_logits_bwd");
  const auto s = check_router_logits_bwd(grad_in, x_in, weight_in);
  const auto dtype = x_in.scalar_type();
  if (!has_bf16_products(x_in)) {
    const auto acc = acc_type(dtype);
    return {acc_product(grad_in, weight_in.to(acc)).to(dtype),
            acc_product(grad_in.t(), x_in.to(acc)).to(dtype)};
  }
  const auto grad = grad_in.contiguous();
  const auto x = x_in.contiguous();
  const auto weight_twice = weight_in.repeat({2, 1});
  auto split = at::empty({s.tokens, 2 * s.experts}, x.options());
  auto grad_x = at::empty({s.tokens, s.width}, x.options());
  auto grad_weight = at::empty({s.experts, s.width}, x.options());
  grad_x_of_bf16(s, data<float>(grad), data<bf16>(weight_twice), mutable_data<bf16>(split),
                 mutable_data<bf16>(grad_x));
  grad_weight_of_bf16(s, data<bf16>(split), data<bf16>(x), mutable_data<bf16>(grad_weight));
  return {grad_x, grad_weight};
}

}  // namespace
}  // namespace unipool::cpu

TORCH_LIBRARY_IMPL(unipool, CPU, m) {
  m.impl("router_logits", &unipool::cpu::router_logits);
  m.impl("router_logits_bwd", &unipool::cpu::router_logits_bwd);
}
