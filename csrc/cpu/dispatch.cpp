// SPDX-License-Identifier: Apache-2.0
// dispatch_plan (a stable counting sort), permute, unpermute and its backward.
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <cstring>
#include <tuple>
#include <vector>

#include "cpu/parallel.h"
#include "cpu/simd/loops.h"
#include "cpu/tensor.h"
#include "ops/checks.h"
#include "unipool/nvtx.h"

namespace unipool::cpu {
namespace {

constexpr int64_t kSlotsPerBlock = 8192;
constexpr int64_t kRowsPerTask = 64;

// A run of slots within one layer.
struct Block {
  const int32_t* experts;
  int64_t first_slot;
  int64_t count;
};

std::tuple<at::Tensor, at::Tensor, at::Tensor> dispatch_plan(at::TensorList experts,
                                                             int64_t num_experts) {
  UNIPOOL_NVTX_RANGE("dispatch_plan");
  const auto shape = check_dispatch_plan(experts, num_experts);
  auto out = alloc_dispatch_plan(shape, experts[0]);
  int32_t* order = mutable_data<int32_t>(out.order);
  int32_t* inverse = mutable_data<int32_t>(out.inverse);
  int32_t* offsets = mutable_data<int32_t>(out.offsets);

  std::vector<at::Tensor> layers;
  std::vector<Block> blocks;
  int64_t slots = 0;
  for (const at::Tensor& layer : experts) {
    layers.push_back(layer.contiguous());
    const int32_t* ids = data<int32_t>(layers.back());
    for (int64_t at = 0; at < layer.numel(); at += kSlotsPerBlock) {
      blocks.push_back({ids + at, slots + at, std::min(kSlotsPerBlock, layer.numel() - at)});
    }
    slots += layer.numel();
  }
  const auto valid = [&](int32_t e) { return e >= 0 && e < num_experts; };

  // rows[b * M + e]: first the count of expert e in block b, then the row where its next slot goes.
  const int64_t count = static_cast<int64_t>(blocks.size());
  std::vector<int32_t> rows(count * num_experts, 0);
  at::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) {
      for (int64_t i = 0; i < blocks[b].count; ++i) {
        if (valid(blocks[b].experts[i])) ++rows[b * num_experts + blocks[b].experts[i]];
      }
    }
  });
  int32_t row = 0;
  for (int64_t e = 0; e < num_experts; ++e) {
    offsets[e] = row;
    for (int64_t b = 0; b < count; ++b) {
      const int32_t here = rows[b * num_experts + e];
      rows[b * num_experts + e] = row;
      row += here;
    }
  }
  offsets[num_experts] = row;
  std::fill(order + row, order + slots, -1);
  at::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) {
      for (int64_t i = 0; i < blocks[b].count; ++i) {
        const int32_t e = blocks[b].experts[i];
        const int64_t slot = blocks[b].first_slot + i;
        const int32_t to = valid(e) ? rows[b * num_experts + e]++ : -1;
        inverse[slot] = to;
        if (to >= 0) order[to] = static_cast<int32_t>(slot);
      }
    }
  });
  return {out.order, out.inverse, out.offsets};
}

at::Tensor permute(const at::Tensor& x_in, const at::Tensor& order_in, int64_t top_k) {
  UNIPOOL_NVTX_RANGE("permute");
  const auto s = check_permute(x_in, order_in, top_k);
  const auto x = x_in.contiguous();
  const auto order = order_in.contiguous();
  check_index_values("permute", "order", order, s.tokens * top_k);
  auto y = alloc_permute(s, x);
  const int32_t* slot = data<int32_t>(order);
  const size_t bytes = s.width * x.element_size();
  const char* from = static_cast<const char*>(x.const_data_ptr());
  char* to = static_cast<char*>(y.mutable_data_ptr());
  at::parallel_for(0, s.rows, kRowsPerTask, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      if (slot[r] < 0) {
        std::memset(to + r * bytes, 0, bytes);
      } else {
        std::memcpy(to + r * bytes, from + slot[r] / top_k * bytes, bytes);
      }
    }
  });
  return y;
}

at::Tensor unpermute(const at::Tensor& y_in, const at::Tensor& inverse_in,
                     const OptionalTensor& weights_in) {
  UNIPOOL_NVTX_RANGE("unpermute");
  const auto s = check_unpermute(y_in, inverse_in, weights_in);
  const auto y = y_in.contiguous();
  const auto inverse = inverse_in.contiguous();
  check_index_values("unpermute", "inverse", inverse, s.rows);
  const auto weights = weights_in ? weights_in->contiguous() : at::Tensor();
  auto x = alloc_unpermute(s, y);
  const int32_t* row = data<int32_t>(inverse);
  for_dtype(y.scalar_type(), [&](auto tag) {
    using T = typename decltype(tag)::type;
    using A = acc_t<T>;
    const T* from = data<T>(y);
    const A* w = weights.defined() ? data<A>(weights) : nullptr;
    T* to = mutable_data<T>(x);
    at::parallel_for(0, s.tokens, kRowsPerTask, [&](int64_t begin, int64_t end) {
      std::vector<A> sum(s.width);
      for (int64_t t = begin; t < end; ++t) {
        std::fill(sum.begin(), sum.end(), A(0));
        for (int64_t slot = t * s.top_k; slot < (t + 1) * s.top_k; ++slot) {
          if (row[slot] < 0) continue;
          loops<T>().axpy(w == nullptr ? A(1) : w[slot], from + row[slot] * s.width, sum.data(),
                          s.width);
        }
        loops<T>().store(A(1), sum.data(), to + t * s.width, s.width);
      }
    });
  });
  return x;
}

std::tuple<at::Tensor, at::Tensor> unpermute_bwd(const at::Tensor& grad_in, const at::Tensor& y_in,
                                                 const at::Tensor& order_in,
                                                 const at::Tensor& inverse_in,
                                                 const at::Tensor& weights_in) {
  UNIPOOL_NVTX_RANGE("unpermute_bwd");
  const auto s = check_unpermute_bwd(grad_in, y_in, order_in, inverse_in, weights_in);
  const auto grad = grad_in.contiguous();
  const auto y = y_in.contiguous();
  const auto order = order_in.contiguous();
  const auto inverse = inverse_in.contiguous();
  const auto weights = weights_in.contiguous();
  check_index_values("unpermute_bwd", "order", order, s.rows);
  check_index_values("unpermute_bwd", "inverse", inverse, s.rows);
  auto [grad_y, grad_weights] = alloc_unpermute_bwd(s, y, weights);
  const int32_t* slot = data<int32_t>(order);
  const int32_t* row = data<int32_t>(inverse);
  for_dtype(y.scalar_type(), [&](auto tag) {
    using T = typename decltype(tag)::type;
    using A = acc_t<T>;
    const T* dx = data<T>(grad);
    const T* from = data<T>(y);
    const A* w = data<A>(weights);
    T* dy = mutable_data<T>(grad_y);
    A* dw = mutable_data<A>(grad_weights);
    at::parallel_for(0, s.rows, kRowsPerTask, [&](int64_t begin, int64_t end) {
      std::vector<A> wide(s.width);
      for (int64_t r = begin; r < end; ++r) {
        if (slot[r] < 0) {
          std::memset(static_cast<void*>(dy + r * s.width), 0, s.width * sizeof(T));
          continue;
        }
        loops<T>().widen(dx + slot[r] / s.top_k * s.width, wide.data(), s.width);
        loops<T>().store(w[slot[r]], wide.data(), dy + r * s.width, s.width);
      }
      for (int64_t at = begin; at < end; ++at) {  // as many slots as rows
        dw[at] = row[at] < 0 ? A(0)
                             : loops<T>().dot(dx + at / s.top_k * s.width, from + row[at] * s.width,
                                              s.width);
      }
    });
  });
  return {grad_y, grad_weights};
}

}  // namespace
}  // namespace unipool::cpu

TORCH_LIBRARY_IMPL(unipool, CPU, m) {
  m.impl("dispatch_plan", &unipool::cpu::dispatch_plan);
  m.impl("permute", &unipool::cpu::permute);
  m.impl("unpermute", &unipool::cpu::unpermute);
  m.impl("unpermute_bwd", &unipool::cpu::unpermute_bwd);
}
