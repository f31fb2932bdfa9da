// SPDX-License-Identifier: Apache-2.0
// The expert ops on CUDA: check, allocate, launch. Nothing waits for the device.
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <limits>
#include <tuple>
#include <vector>

#include "cuda/op.h"
#include "unipool/experts.h"

namespace unipool::cuda {
namespace {

// --- rows times weights

using GroupedMmLauncher = cudaError_t (*)(const GroupedMmArgs&, cudaStream_t);

at::Tensor row_products(const char* op, GroupedMmLauncher launch, const GroupedShape& s,
                        int64_t width, const at::Tensor& a_in, const at::Tensor& b_in,
                        const at::Tensor& offsets_in) {
  LaunchScope scope(a_in);
  const auto a = a_in.contiguous(), b = b_in.contiguous(), offsets = offsets_in.contiguous();
  auto out = at::empty({s.rows, width}, a.options());
  scope.run(launch, GroupedMmArgs{scope.data(a), scope.data(b), scope.data<int32_t>(offsets),
                                  scope.mutable_data(out), s.rows, s.n, s.k,
                                  static_cast<int>(s.experts), dtype_of(op, a), kAutoTile});
  return out;
}

at::Tensor grouped_mm(const at::Tensor& a, const at::Tensor& b, const at::Tensor& offsets) {
  const auto s = check_grouped_mm(a, b, offsets);
  UNIPOOL_NVTX_RANGE("grouped_mm");
  return row_products("grouped_mm", launch_grouped_mm, s, s.n, a, b, offsets);
}

at::Tensor grouped_mm_bwd_a(const at::Tensor& grad, const at::Tensor& b,
                            const at::Tensor& offsets) {
  const auto s = check_grouped_mm_bwd_a(grad, b, offsets);
  UNIPOOL_NVTX_RANGE("grouped_mm_bwd_a");
  return row_products("grouped_mm_bwd_a", launch_grouped_mm_bwd_a, s, s.k, grad, b, offsets);
}

// --- weight gradient

std::vector<at::Tensor> contiguous(at::TensorList tensors) {
  std::vector<at::Tensor> result;
  result.reserve(tensors.size());
  for (const at::Tensor& t : tensors) result.push_back(t.contiguous());
  return result;
}

// The segments of a weight gradient, contiguous.
struct Segments {
  std::vector<at::Tensor> grad, input, order, offsets;
  int grad_top_k, input_top_k;

  Segments(at::TensorList grad_in, at::TensorList input_in, at::TensorList order_in,
           at::TensorList offsets_in, int64_t grad_k, int64_t input_k)
      : grad(contiguous(grad_in)),
        input(contiguous(input_in)),
        order(contiguous(order_in)),
        offsets(contiguous(offsets_in)),
        grad_top_k(static_cast<int>(grad_k)),
        input_top_k(static_cast<int>(input_k)) {}

  size_t count() const { return grad.size(); }
  int64_t rows(size_t i) const { return grad[i].size(0) * std::max(grad_top_k, 1); }

  // The end of the segments from `first` on that one launch takes: its limit, and sorted rows of
  // all of them that 32 bits can count.
  size_t end_of_launch(size_t first) const {
    const size_t most = std::min(count(), first + kMaxWgradSegments);
    int64_t total = rows(first);
    size_t end = first + 1;
    while (end < most && total + rows(end) <= std::numeric_limits<int32_t>::max()) {
      total += rows(end++);
    }
    return end;
  }
};

// One launch over the segments [first, end).
void launch_wgrad(const char* op, LaunchScope& scope, const WgradShape& s, const Segments& segments,
                  size_t first, size_t end, const at::Tensor& out, bool add) {
  GroupedWgradArgs args{};
  int64_t total = 0;
  for (size_t i = first; i < end; ++i) {
    args.segments[args.count++] = {
        scope.data(segments.grad[i]), scope.data(segments.input[i]),
        segments.order.empty() ? nullptr : scope.data<int32_t>(segments.order[i]),
        scope.data<int32_t>(segments.offsets[i]), segments.rows(i)};
    total += segments.rows(i);
  }
  args.grad_top_k = segments.grad_top_k;
  args.input_top_k = segments.input_top_k;
  args.out = scope.mutable_data(out);
  args.add = add;
  args.n = s.n;
  args.k = s.k;
  args.experts = static_cast<int>(s.experts);
  args.dtype = dtype_of(op, segments.grad[first]);
  args.out_dtype = dtype_of(op, out);
  const int64_t row_bytes = std::max(s.n, s.k) * segments.grad[first].element_size();
  args.workspace =
      scope.workspace(grouped_wgrad_workspace_bytes(total, args.experts, row_bytes), out);
  args.tile = kAutoTile;
  scope.run(launch_grouped_wgrad, args);
}

at::Tensor grouped_wgrad(at::TensorList grad, at::TensorList input, at::TensorList order,
                         at::TensorList offsets, int64_t grad_top_k, int64_t input_top_k,
                         std::optional<at::ScalarType> out_dtype) {
  const auto s = check_grouped_wgrad(grad, input, order, offsets, grad_top_k, input_top_k);
  const auto dtype = check_wgrad_dtype(grad, out_dtype);
  LaunchScope scope(grad[0]);
  UNIPOOL_NVTX_RANGE("grouped_wgrad");
  const Segments segments(grad, input, order, offsets, grad_top_k, input_top_k);
  size_t end = segments.end_of_launch(0);
  // What several launches add up stays in float32 until all have.
  const auto sum_type = end == segments.count() ? dtype : at::kFloat;
  auto out = at::empty({s.experts, s.n, s.k}, grad[0].options().dtype(sum_type));
  launch_wgrad("grouped_wgrad", scope, s, segments, 0, end, out, false);
  for (size_t first = end; first < segments.count(); first = end) {
    end = segments.end_of_launch(first);
    launch_wgrad("grouped_wgrad", scope, s, segments, first, end, out, true);
  }
  return out.to(dtype);
}

void grouped_wgrad_(at::Tensor& sum, at::TensorList grad, at::TensorList input,
                    at::TensorList order, at::TensorList offsets, int64_t grad_top_k,
                    int64_t input_top_k) {
  const auto s = check_grouped_wgrad(grad, input, order, offsets, grad_top_k, input_top_k);
  check_wgrad_sum(sum, s, grad);
  LaunchScope scope(sum);
  UNIPOOL_NVTX_RANGE("grouped_wgrad_");
  const Segments segments(grad, input, order, offsets, grad_top_k, input_top_k);
  for (size_t first = 0, end; first < segments.count(); first = end) {
    end = segments.end_of_launch(first);
    launch_wgrad("grouped_wgrad_", scope, s, segments, first, end, sum, true);
  }
}

// --- expert_mlp

// The weights and the plan of a layer call, contiguous.
struct Layer {
  at::Tensor weights, gate_up, down, order, inverse, offsets;
};

Layer contiguous(const Layer& l) {
  return {l.weights.contiguous(), l.gate_up.contiguous(), l.down.contiguous(),
          l.order.contiguous(),   l.inverse.contiguous(), l.offsets.contiguous()};
}

// One row a slot, from a kernel that stores a token's only slot in the token's place: then it is
// the result; otherwise rows are sorted, and those of a token are summed in slot order.
at::Tensor combine(const at::Tensor& rows, const ExpertShape& s, const at::Tensor& inverse) {
  return s.top_k == 1 ? rows : unpermute(rows, inverse, std::nullopt);
}

std::tuple<at::Tensor, at::Tensor> expert_mlp(const at::Tensor& x_in, const at::Tensor& weights,
                                              const at::Tensor& gate_up, const at::Tensor& down,
                                              const at::Tensor& order, const at::Tensor& inverse,
                                              const at::Tensor& offsets, bool keep_preact) {
  const auto s = check_expert_mlp(x_in, weights, gate_up, down, order, inverse, offsets);
  const DType dtype = dtype_of("expert_mlp", x_in);
  LaunchScope scope(x_in);
  UNIPOOL_NVTX_RANGE("expert_mlp");
  const auto x = x_in.contiguous();
  const auto l = contiguous(Layer{weights, gate_up, down, order, inverse, offsets});
  const auto experts = static_cast<int>(s.experts), top_k = static_cast<int>(s.top_k);

  auto preact = at::empty({keep_preact ? s.rows() : 0, 2 * s.d_ff}, x.options());
  auto hidden = at::empty({s.rows(), s.d_ff}, x.options());
  scope.run(
      launch_expert_up,
      ExpertUpArgs{scope.data(x), scope.data(l.gate_up), scope.data<int32_t>(l.order),
                   scope.data<int32_t>(l.offsets),
                   keep_preact ? scope.mutable_data(preact) : nullptr, scope.mutable_data(hidden),
                   s.rows(), s.d_model, s.d_ff, experts, top_k, dtype, kAutoTile});

  auto rows = at::empty({s.rows(), s.d_model}, x.options());
  scope.run(launch_expert_down,
            ExpertDownArgs{scope.data(hidden), scope.data(l.down), scope.data<float>(l.weights),
                           scope.data<int32_t>(l.order), scope.data<int32_t>(l.inverse),
                           scope.data<int32_t>(l.offsets), scope.mutable_data(rows), s.rows(),
                           s.d_model, s.d_ff, experts, top_k, dtype, kAutoTile});
  return {combine(rows, s, l.inverse), preact};
}

struct LayerGrads {
  at::Tensor x, weights, hidden;
};

// grad_preact may be preact itself.
LayerGrads layer_backward(const char* op, const ExpertShape& s, const at::Tensor& grad_in,
                          const Layer& layer, const at::Tensor& preact,
                          const at::Tensor& grad_preact) {
  const DType dtype = dtype_of(op, grad_in);
  LaunchScope scope(grad_in);
  const auto grad = grad_in.contiguous();
  const auto l = contiguous(layer);
  const auto experts = static_cast<int>(s.experts), top_k = static_cast<int>(s.top_k);

  auto hidden = at::empty({s.rows(), s.d_ff}, grad.options());
  auto grad_weights = at::empty({s.tokens, s.top_k}, l.weights.options());
  void* workspace = scope.workspace(expert_hidden_bwd_workspace_bytes(s.rows(), s.d_ff), grad);
  scope.run(launch_expert_hidden_bwd,
            ExpertHiddenBwdArgs{scope.data(grad), scope.data(l.down), scope.data<float>(l.weights),
                                scope.data<int32_t>(l.order), scope.data<int32_t>(l.inverse),
                                scope.data<int32_t>(l.offsets), scope.data(preact),
                                scope.mutable_data(grad_preact), scope.mutable_data(hidden),
                                scope.mutable_data<float>(grad_weights), workspace, s.rows(),
                                s.d_model, s.d_ff, experts, top_k, dtype, kAutoTile});

  auto rows = at::empty({s.rows(), s.d_model}, grad.options());
  scope.run(launch_expert_input_bwd,
            ExpertInputBwdArgs{scope.data(grad_preact), scope.data(l.gate_up),
                               scope.data<int32_t>(l.order), scope.data<int32_t>(l.inverse),
                               scope.data<int32_t>(l.offsets), scope.mutable_data(rows), s.rows(),
                               s.d_model, s.d_ff, experts, top_k, dtype, kAutoTile});
  return {combine(rows, s, l.inverse), grad_weights, hidden};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> expert_mlp_bwd(
    const at::Tensor& grad, const at::Tensor& weights, const at::Tensor& gate_up,
    const at::Tensor& down, const at::Tensor& order, const at::Tensor& inverse,
    const at::Tensor& offsets, const at::Tensor& preact) {
  const auto s =
      check_expert_mlp_bwd(grad, weights, gate_up, down, order, inverse, offsets, preact);
  UNIPOOL_NVTX_RANGE("expert_mlp_bwd");
  auto grad_preact = at::empty({s.rows(), 2 * s.d_ff}, preact.options());
  const auto got =
      layer_backward("expert_mlp_bwd", s, grad, {weights, gate_up, down, order, inverse, offsets},
                     preact.contiguous(), grad_preact);
  return {got.x, got.weights, grad_preact, got.hidden};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> expert_mlp_bwd_(
    const at::Tensor& grad, const at::Tensor& weights, const at::Tensor& gate_up,
    const at::Tensor& down, const at::Tensor& order, const at::Tensor& inverse,
    const at::Tensor& offsets, at::Tensor& preact) {
  const auto s =
      check_expert_mlp_bwd_(grad, weights, gate_up, down, order, inverse, offsets, preact);
  UNIPOOL_NVTX_RANGE("expert_mlp_bwd_");
  const auto got =
      layer_backward("expert_mlp_bwd_", s, grad, {weights, gate_up, down, order, inverse, offsets},
                     preact, preact);
  return {got.x, got.weights, got.hidden};
}

}  // namespace
}  // namespace unipool::cuda

TORCH_LIBRARY_IMPL(unipool, CUDA, m) {
  m.impl("grouped_mm", &unipool::cuda::grouped_mm);
  m.impl("grouped_mm_bwd_a", &unipool::cuda::grouped_mm_bwd_a);
  m.impl("grouped_wgrad", &unipool::cuda::grouped_wgrad);
  m.impl("grouped_wgrad_", &unipool::cuda::grouped_wgrad_);
  m.impl("expert_mlp", &unipool::cuda::expert_mlp);
  m.impl("expert_mlp_bwd", &unipool::cuda::expert_mlp_bwd);
  m.impl("expert_mlp_bwd_", &unipool::cuda::expert_mlp_bwd_);
}
