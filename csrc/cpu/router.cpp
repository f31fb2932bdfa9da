// SPDX-License-Identifier: Apache-2.0
// norm_topk and softmax_topk, forward and backward: one pass over the logits, no [T, M] temporary.
// Tokens go in blocks of kBlock; sums over tokens are formed per block and then over the blocks in
// order, so they do not depend on the number of threads.
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <tuple>
#include <vector>

#include "cpu/parallel.h"
#include "cpu/simd/loops.h"
#include "cpu/tensor.h"
#include "ops/checks.h"
#include "unipool/nvtx.h"

namespace unipool::cpu {
namespace {

constexpr int64_t kBlock = 128;  // tokens

using RouterResult = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

OptionalTensor contiguous(const OptionalTensor& t) {
  return t ? OptionalTensor(t->contiguous()) : std::nullopt;
}

template <class T>
const T* data_or_null(const OptionalTensor& t) {
  return t ? data<T>(*t) : nullptr;
}

// As bytes, since a bool that is neither 0 nor 1 (a view of other memory) is no value of C++.
const uint8_t* mask_bytes(const OptionalTensor& mask) {
  return mask ? static_cast<const uint8_t*>(mask->const_data_ptr()) : nullptr;
}

// out[i] = sum over blocks of partial[block][i], in block order
template <class A>
void sum_blocks(const std::vector<A>& partial, int64_t blocks, int64_t n, A* out) {
  std::vector<double> sum(n, 0.0);
  for (int64_t block = 0; block < blocks; ++block) {
    for (int64_t i = 0; i < n; ++i) sum[i] += partial[block * n + i];
  }
  for (int64_t i = 0; i < n; ++i) out[i] = static_cast<A>(sum[i]);
}

// row_kernel(RouterRow) fills weights and ids of one token and adds to importance.
template <class T, class RowKernel>
RouterResult route(const RouterShape& s, const at::Tensor& logits_in, const OptionalTensor& bias_in,
                   const OptionalTensor& mask_in, RowKernel row_kernel) {
  using A = acc_t<T>;
  const auto logits = logits_in.contiguous();
  const auto bias = contiguous(bias_in);
  const auto mask = contiguous(mask_in);
  auto out = alloc_router(s, logits);
  const T* z = data<T>(logits);
  A* weights = mutable_data<A>(out.weights);
  int32_t* experts = mutable_data<int32_t>(out.experts);
  int32_t* load = mutable_data<int32_t>(out.load);

  const int64_t blocks = (s.tokens + kBlock - 1) / kBlock;
  std::vector<A> importance(blocks * s.experts, A(0));
  at::parallel_for(0, blocks, 1, [&](int64_t begin, int64_t end) {
    std::vector<A> scratch(2 * s.experts);
    for (int64_t block = begin; block < end; ++block) {
      const int64_t last = std::min(s.tokens, (block + 1) * kBlock);
      for (int64_t t = block * kBlock; t < last; ++t) {
        row_kernel(RouterRow<T>{z + t * s.experts, s.experts, s.top_k, data_or_null<A>(bias),
                                mask_bytes(mask), scratch.data(), weights + t * s.top_k,
                                experts + t * s.top_k, importance.data() + block * s.experts});
      }
    }
  });
  sum_blocks(importance, blocks, s.experts, mutable_data<A>(out.importance));
  std::fill(load, load + s.experts, 0);
  for (int64_t slot = 0; slot < s.tokens * s.top_k; ++slot) {
    if (experts[slot] >= 0) ++load[experts[slot]];
  }
  return {out.weights, out.experts, out.load, out.importance};
}

// row_kernel(RouterRowBwd) writes one token's grad_logits and returns its share of a scalar
// gradient. Returns grad_logits and that scalar, summed over tokens.
template <class T, class RowKernel>
std::pair<at::Tensor, acc_t<T>> route_bwd(const RouterShape& s, const OptionalTensor& gw_in,
                                          const OptionalTensor& gi_in, const at::Tensor& logits_in,
                                          const at::Tensor& experts_in,
                                          const OptionalTensor& mask_in, RowKernel row_kernel) {
  using A = acc_t<T>;
  const auto grad_weights = contiguous(gw_in);
  const auto grad_importance = contiguous(gi_in);
  const auto logits = logits_in.contiguous();
  const auto experts = experts_in.contiguous();
  const auto mask = contiguous(mask_in);
  auto grad_logits = alloc_grad_logits(s, logits);
  const T* z = data<T>(logits);
  const int32_t* ids = data<int32_t>(experts);
  const A* gw = data_or_null<A>(grad_weights);
  T* dz = mutable_data<T>(grad_logits);

  const int64_t blocks = (s.tokens + kBlock - 1) / kBlock;
  std::vector<A> partial(blocks, A(0));
  at::parallel_for(0, blocks, 1, [&](int64_t begin, int64_t end) {
    std::vector<A> scratch(2 * s.experts);
    for (int64_t block = begin; block < end; ++block) {
      const int64_t last = std::min(s.tokens, (block + 1) * kBlock);
      for (int64_t t = block * kBlock; t < last; ++t) {
        partial[block] += row_kernel(
            RouterRowBwd<T>{z + t * s.experts, s.experts, s.top_k, mask_bytes(mask),
                            ids + t * s.top_k, gw == nullptr ? nullptr : gw + t * s.top_k,
                            data_or_null<A>(grad_importance), scratch.data(), dz + t * s.experts});
      }
    }
  });
  A total;
  sum_blocks(partial, blocks, 1, &total);
  return {grad_logits, total};
}

RouterResult norm_topk(const at::Tensor& logits, const at::Tensor& scale, int64_t top_k,
                       double calibration, double eps, const OptionalTensor& bias,
                       const OptionalTensor& mask) {
  UNIPOOL_NVTX_RANGE("norm_topk");
  const auto shape = check_norm_topk(logits, scale, top_k, calibration, eps, bias, mask);
  return for_dtype(logits.scalar_type(), [&](auto tag) {
    using T = typename decltype(tag)::type;
    using A = acc_t<T>;
    const A coef = *data<A>(scale) * static_cast<A>(calibration);
    return route<T>(shape, logits, bias, mask, [&](const RouterRow<T>& row) {
      loops<T>().norm_topk(row, coef, static_cast<A>(eps));
    });
  });
}

std::tuple<at::Tensor, at::Tensor> norm_topk_bwd(const OptionalTensor& grad_weights,
                                                 const OptionalTensor& grad_importance,
                                                 const at::Tensor& logits, const at::Tensor& scale,
                                                 const at::Tensor& experts, double calibration,
                                                 double eps, const OptionalTensor& mask) {
  UNIPOOL_NVTX_RANGE("norm_topk_bwd");
  const auto shape = check_norm_topk_bwd(grad_weights, grad_importance, logits, scale, experts,
                                         calibration, eps, mask);
  return for_dtype(logits.scalar_type(), [&](auto tag) {
    using T = typename decltype(tag)::type;
    using A = acc_t<T>;
    const A coef = *data<A>(scale) * static_cast<A>(calibration);
    auto [grad_logits, grad_coef] =
        route_bwd<T>(shape, grad_weights, grad_importance, logits, experts, mask,
                     [&](const RouterRowBwd<T>& row) {
                       return loops<T>().norm_topk_bwd(row, coef, static_cast<A>(eps));
                     });
    auto grad_scale = alloc_grad_scale(scale);
    *mutable_data<A>(grad_scale) = grad_coef * static_cast<A>(calibration);
    return std::make_tuple(grad_logits, grad_scale);
  });
}

RouterResult softmax_topk(const at::Tensor& logits, int64_t top_k, bool renormalize,
                          const OptionalTensor& bias, const OptionalTensor& mask) {
  UNIPOOL_NVTX_RANGE("softmax_topk");
  const auto shape = check_softmax_topk(logits, top_k, renormalize, bias, mask);
  return for_dtype(logits.scalar_type(), [&](auto tag) {
    using T = typename decltype(tag)::type;
    return route<T>(shape, logits, bias, mask,
                    [&](const RouterRow<T>& row) { loops<T>().softmax_topk(row, renormalize); });
  });
}

at::Tensor softmax_topk_bwd(const OptionalTensor& grad_weights,
                            const OptionalTensor& grad_importance, const at::Tensor& logits,
                            const at::Tensor& experts, bool renormalize,
                            const OptionalTensor& mask) {
  UNIPOOL_NVTX_RANGE("softmax_topk_bwd");
  const auto shape =
      check_softmax_topk_bwd(grad_weights, grad_importance, logits, experts, renormalize, mask);
  return for_dtype(logits.scalar_type(), [&](auto tag) {
    using T = typename decltype(tag)::type;
    return route_bwd<T>(shape, grad_weights, grad_importance, logits, experts, mask,
                        [&](const RouterRowBwd<T>& row) {
                          loops<T>().softmax_topk_bwd(row, renormalize);
                          return acc_t<T>(0);
                        })
        .first;
  });
}

}  // namespace
}  // namespace unipool::cpu

TORCH_LIBRARY_IMPL(unipool, CPU, m) {
  m.impl("norm_topk", &unipool::cpu::norm_topk);
  m.impl("norm_topk_bwd", &unipool::cpu::norm_topk_bwd);
  m.impl("softmax_topk", &unipool::cpu::softmax_topk);
  m.impl("softmax_topk_bwd", &unipool::cpu::softmax_topk_bwd);
}
