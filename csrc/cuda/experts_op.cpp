// SPDX-License-Identifier: Apache-2.0
// The expert ops on CUDA, composed of the dispatch kernels and PyTorch's own operations: grouped
// products are at::_grouped_mm where its alignment rules allow, else one product an expert, for
// which the host has to wait for the offsets.
#include <ATen/ATen.h>
#include <torch/library.h>

#include <tuple>
#include <vector>

#include "cuda/op.h"

namespace unipool::cuda {
namespace {

constexpr int64_t kGroupedMmAlignment = 16;  // bytes, of addresses and of rows

bool grouped_mm_takes(const at::Tensor& t) {
  const auto size = static_cast<int64_t>(t.element_size());
  const int64_t row = std::max(t.stride(-1), t.stride(-2));
  return t.numel() > 0 && std::min(t.stride(-1), t.stride(-2)) == 1 &&
         row * size % kGroupedMmAlignment == 0 && is_aligned(t.const_data_ptr(), 0);
}

at::Tensor ends(const at::Tensor& offsets) { return offsets.slice(0, 1); }

std::vector<int64_t> on_host(const at::Tensor& offsets) {
  const auto host = offsets.to(at::kCPU);
  const int32_t* o = host.const_data_ptr<int32_t>();
  return {o, o + host.numel()};
}

// a [N, K], b [M, K, n] of any strides -> [N, n]: rows of expert e times b[e], zero past
// offsets[M].
at::Tensor row_products(const at::Tensor& a, const at::Tensor& b, const at::Tensor& offsets) {
  const int64_t rows = a.size(0), experts = b.size(0);
  if (rows > 0 && grouped_mm_takes(a) && grouped_mm_takes(b) &&
      b.size(2) * static_cast<int64_t>(b.element_size()) % kGroupedMmAlignment == 0) {
    auto out = at::_grouped_mm(a, b, ends(offsets));
    const auto index = at::arange(rows, offsets.options());
    return out.masked_fill_((index >= offsets[experts]).unsqueeze(1), 0);
  }
  auto out = at::zeros({rows, b.size(2)}, a.options());
  const auto at_row = on_host(offsets);
  for (int64_t e = 0; e < experts; ++e) {
    auto here = out.slice(0, at_row[e], at_row[e + 1]);
    if (here.size(0) > 0) at::mm_out(here, a.slice(0, at_row[e], at_row[e + 1]), b[e]);
  }
  return out;
}

// grad [N, n], input [N, K] in sorted rows -> [M, n, K]: grad^T input over the rows of each expert.
at::Tensor column_products(const at::Tensor& grad, const at::Tensor& input,
                           const at::Tensor& offsets) {
  const int64_t experts = offsets.numel() - 1;
  if (grouped_mm_takes(grad) && grouped_mm_takes(input)) {
    const auto last = ends(offsets), first = offsets.slice(0, 0, experts);
    auto out = at::_grouped_mm(grad.t(), input, last);
    return out.masked_fill_((last == first).view({experts, 1, 1}), 0);  // not left to the library
  }
  auto out = at::zeros({experts, grad.size(1), input.size(1)}, grad.options());
  const auto at_row = on_host(offsets);
  for (int64_t e = 0; e < experts; ++e) {
    if (at_row[e] == at_row[e + 1]) continue;
    auto here = out[e];
    at::mm_out(here, grad.slice(0, at_row[e], at_row[e + 1]).t(),
               input.slice(0, at_row[e], at_row[e + 1]));
  }
  return out;
}

at::Tensor grouped_mm(const at::Tensor& a, const at::Tensor& b, const at::Tensor& offsets) {
  check_grouped_mm(a, b, offsets);
  const LaunchScope scope(a);
  UNIPOOL_NVTX_RANGE("grouped_mm");
  return row_products(a.contiguous(), b.contiguous().transpose(1, 2), offsets.contiguous());
}

at::Tensor grouped_mm_bwd_a(const at::Tensor& grad, const at::Tensor& b,
                            const at::Tensor& offsets) {
  check_grouped_mm_bwd_a(grad, b, offsets);
  const LaunchScope scope(grad);
  UNIPOOL_NVTX_RANGE("grouped_mm_bwd_a");
  return row_products(grad.contiguous(), b.contiguous(), offsets.contiguous());
}

// --- weight gradient

// The rows of all segments, those of an expert together; rows past a segment's last one at the end.
struct SortedRows {
  at::Tensor grad, input, offsets;
};

SortedRows merge(const std::vector<at::Tensor>& grads, const std::vector<at::Tensor>& inputs,
                 at::TensorList offsets) {
  if (grads.size() == 1) return {grads[0], inputs[0], offsets[0].contiguous()};
  std::vector<at::Tensor> expert;
  auto sum = at::zeros_like(offsets[0]);
  for (size_t i = 0; i < grads.size(); ++i) {
    const auto row = at::arange(grads[i].size(0), offsets[i].options());
    expert.push_back(at::searchsorted(ends(offsets[i]).contiguous(), row, false, /*right=*/true));
    sum.add_(offsets[i]);
  }
  const auto order = at::argsort(at::cat(expert), /*stable=*/true);
  return {at::cat(grads).index_select(0, order), at::cat(inputs).index_select(0, order), sum};
}

at::Tensor grouped_wgrad(at::TensorList grad, at::TensorList input, at::TensorList order,
                         at::TensorList offsets, int64_t grad_top_k, int64_t input_top_k,
                         std::optional<at::ScalarType> out_dtype) {
  check_grouped_wgrad(grad, input, order, offsets, grad_top_k, input_top_k);
  const auto dtype = check_wgrad_dtype(grad, out_dtype);
  const LaunchScope scope(grad[0]);
  UNIPOOL_NVTX_RANGE("grouped_wgrad");
  std::vector<at::Tensor> grads, inputs;
  for (size_t i = 0; i < grad.size(); ++i) {
    grads.push_back(grad_top_k > 0 ? permute(grad[i], order[i], grad_top_k) : grad[i].contiguous());
    inputs.push_back(input_top_k > 0 ? permute(input[i], order[i], input_top_k)
                                     : input[i].contiguous());
  }
  const auto rows = merge(grads, inputs, offsets);
  return column_products(rows.grad.to(dtype), rows.input.to(dtype), rows.offsets);
}

void grouped_wgrad_(at::Tensor& sum, at::TensorList grad, at::TensorList input,
                    at::TensorList order, at::TensorList offsets, int64_t grad_top_k,
                    int64_t input_top_k) {
  const auto s = check_grouped_wgrad(grad, input, order, offsets, grad_top_k, input_top_k);
  check_wgrad_sum(sum, s, grad);
  sum.add_(grouped_wgrad(grad, input, order, offsets, grad_top_k, input_top_k, sum.scalar_type()));
}

// --- expert_mlp

struct Activation {
  at::Tensor gate, up, sigmoid;  // [N, F] float32
  at::Tensor hidden() const { return gate * sigmoid * up; }
};

Activation activate(const at::Tensor& preact) {
  const auto halves = preact.to(at::kFloat).chunk(2, 1);
  return {halves[0], halves[1], halves[0].sigmoid()};
}

std::tuple<at::Tensor, at::Tensor> expert_mlp(const at::Tensor& x, const at::Tensor& weights,
                                              const at::Tensor& gate_up, const at::Tensor& down,
                                              const at::Tensor& order, const at::Tensor& inverse,
                                              const at::Tensor& offsets, bool keep_preact) {
  const auto s = check_expert_mlp(x, weights, gate_up, down, order, inverse, offsets);
  const LaunchScope scope(x);
  UNIPOOL_NVTX_RANGE("expert_mlp");
  const auto bounds = offsets.contiguous();
  auto preact =
      row_products(permute(x, order, s.top_k), gate_up.contiguous().transpose(1, 2), bounds);
  const auto hidden = activate(preact).hidden().to(x.scalar_type());
  const auto rows = row_products(hidden, down.contiguous().transpose(1, 2), bounds);
  if (!keep_preact) preact = at::empty({0, 2 * s.d_ff}, x.options());
  return {unpermute(rows, inverse, weights), preact};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> expert_mlp_bwd(
    const at::Tensor& grad, const at::Tensor& weights, const at::Tensor& gate_up,
    const at::Tensor& down, const at::Tensor& order, const at::Tensor& inverse,
    const at::Tensor& offsets, const at::Tensor& preact) {
  const auto s =
      check_expert_mlp_bwd(grad, weights, gate_up, down, order, inverse, offsets, preact);
  const LaunchScope scope(grad);
  UNIPOOL_NVTX_RANGE("expert_mlp_bwd");
  const auto bounds = offsets.contiguous();
  const auto dtype = grad.scalar_type();
  const auto a = activate(preact);
  const auto hidden = a.hidden();
  const auto grad_hidden =
      row_products(permute(grad, order, s.top_k), down.contiguous(), bounds).to(at::kFloat);

  // Weight of a sorted row, and gradient of a slot's weight; 0 where there is no slot or no row.
  const auto used = order >= 0, placed = inverse >= 0;
  const auto weight =
      at::where(used, weights.flatten().index_select(0, order.clamp_min(0)), 0.0).unsqueeze(1);
  const auto row_grad = (grad_hidden * hidden).sum(1);
  const auto slot_grad = row_grad.index_select(0, inverse.flatten().clamp_min(0));
  const auto grad_weights = at::where(placed, slot_grad.view_as(inverse), 0.0);

  const auto grad_act = grad_hidden * weight;
  const auto silu = a.gate * a.sigmoid;
  const auto silu_bwd = a.sigmoid * (1 + a.gate * (1 - a.sigmoid));
  const auto grad_preact = at::cat({grad_act * a.up * silu_bwd, grad_act * silu}, 1).to(dtype);
  const auto grad_rows = row_products(grad_preact, gate_up.contiguous(), bounds);
  return {unpermute(grad_rows, inverse, std::nullopt), grad_weights, grad_preact,
          (hidden * weight).to(dtype)};
}

}  // namespace
}  // namespace unipool::cuda

TORCH_LIBRARY_IMPL(UNIPOOL_NAMESPACE, UNIPOOL_CUDA_KEY, m) {
  m.impl("grouped_mm", &unipool::cuda::grouped_mm);
  m.impl("grouped_mm_bwd_a", &unipool::cuda::grouped_mm_bwd_a);
  m.impl("grouped_wgrad", &unipool::cuda::grouped_wgrad);
  m.impl("grouped_wgrad_", &unipool::cuda::grouped_wgrad_);
  m.impl("expert_mlp", &unipool::cuda::expert_mlp);
  m.impl("expert_mlp_bwd", &unipool::cuda::expert_mlp_bwd);
}
