// SPDX-License-Identifier: Apache-2.0
// Router logits on CUDA, by cuBLAS: bfloat16 and float16 operands as they lie, float32 sums.
#include <ATen/Context.h>
#include <ATen/ops/add.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/sub.h>
#include <torch/library.h>

#include <tuple>

#include "cuda/op.h"

namespace unipool::cuda {
namespace {

// Whether ATen multiplies this dtype with a float32 result: no float16 while the program lets
// float16 products be summed in float16.
bool widens(at::ScalarType dtype) {
  return dtype == at::kBFloat16 ||
         (dtype == at::kHalf && !at::globalContext().allowFP16AccumulationCuBLAS());
}

// a [m, k] times b [k, n], in float32. The out variants, as autocast would narrow the operands of
// at::mm.
at::Tensor acc_product(const at::Tensor& a, const at::Tensor& b) {
  auto out = at::empty({a.size(0), b.size(1)}, a.options().dtype(at::kFloat));
  if (widens(a.scalar_type())) return at::mm_out(out, a, b, at::kFloat);
  return at::mm_out(out, a.to(at::kFloat), b.to(at::kFloat));
}

at::Tensor router_logits(const at::Tensor& x, const at::Tensor& weight) {
  check_router_logits(x, weight);
  LaunchScope scope(x);
  UNIPOOL_NVTX_RANGE("router_logits");
  return acc_product(x, weight.t());
}

// [T, M] float32 -> [hi | lo] [T, 2 M] bfloat16 with grad = hi + lo to 2^-17; lo is 0 where hi is
// not finite: NaN and infinity are told by hi alone.
at::Tensor split_in_two(const at::Tensor& grad) {
  const int64_t experts = grad.size(1);
  auto split = at::empty({grad.size(0), 2 * experts}, grad.options().dtype(at::kBFloat16));
  auto high = split.narrow(1, 0, experts);
  high.copy_(grad);
  split.narrow(1, experts, experts).copy_(at::sub(grad, high).nan_to_num_(0.0, 0.0, 0.0));
  return split;
}

std::tuple<at::Tensor, at::Tensor> router_logits_bwd(const at::Tensor& grad, const at::Tensor& x,
                                                     const at::Tensor& weight) {
  const auto s = check_router_logits_bwd(grad, x, weight);
  LaunchScope scope(x);
  UNIPOOL_NVTX_RANGE("router_logits_bwd");
  const auto dtype = x.scalar_type();
  if (dtype != at::kBFloat16) {  // two float16 numbers have not the range of a float32 gradient
    return {acc_product(grad, weight.to(at::kFloat)).to(dtype),
            acc_product(grad.t(), x.to(at::kFloat)).to(dtype)};
  }
  const auto split = split_in_two(grad);
  const auto sums = acc_product(split.t(), x);
  return {acc_product(split, weight.repeat({2, 1})).to(dtype),
          at::add(sums.narrow(0, 0, s.experts), sums.narrow(0, s.experts, s.experts)).to(dtype)};
}

}  // namespace
}  // namespace unipool::cuda

TORCH_LIBRARY_IMPL(unipool, CUDA, m) {
  m.impl("router_logits", &unipool::cuda::router_logits);
  m.impl("router_logits_bwd", &unipool::cuda::router_logits_bwd);
}
