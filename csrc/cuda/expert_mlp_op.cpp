// SPDX-License-Identifier: Apache-2.0
// The expert MLP on CUDA: check, allocate, launch. Nothing waits for the device.
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <tuple>

#include "cuda/op.h"
#include "unipool/expert_mlp.h"

namespace unipool::cuda {
namespace {

// The weights and the plan of a layer call, contiguous.
struct Layer {
  at::Tensor weights, gate_up, down, order, inverse, offsets;
};

Layer contiguous(const Layer& l) {
  return {l.weights.contiguous(), l.gate_up.contiguous(), l.down.contiguous(),
          l.order.contiguous(),   l.inverse.contiguous(), l.offsets.contiguous()};
}

// Where a kernel stores the results of the slots: in their tokens' rows if these have one slot
// each, else in sorted rows, which add_up() sums into the tokens' rows in slot order.
class SlotRows {
 public:
  SlotRows(const ExpertShape& s, const at::Tensor& tokens)
      : tokens_(tokens),
        rows_(s.top_k == 1 ? tokens : at::empty({s.rows(), s.d_model}, tokens.options())) {}

  const at::Tensor& rows() const { return rows_; }
  void add_up(const at::Tensor& inverse) const {
    if (!rows_.is_same(tokens_)) unpermute_into(tokens_, rows_, inverse, std::nullopt);
  }

 private:
  at::Tensor tokens_, rows_;
};

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

  const auto out = alloc_expert_mlp(s, x, keep_preact);
  auto hidden = at::empty({s.rows(), s.d_ff}, x.options());
  scope.run(launch_expert_up,
            ExpertUpArgs{scope.data(x), scope.data(l.gate_up), scope.data<int32_t>(l.order),
                         scope.data<int32_t>(l.offsets),
                         keep_preact ? scope.mutable_data(out.preact) : nullptr,
                         scope.mutable_data(hidden), s.rows(), s.d_model, s.d_ff, experts, top_k,
                         dtype, kAutoTile});

  const SlotRows y(s, out.y);
  scope.run(launch_expert_down,
            ExpertDownArgs{scope.data(hidden), scope.data(l.down), scope.data<float>(l.weights),
                           scope.data<int32_t>(l.order), scope.data<int32_t>(l.inverse),
                           scope.data<int32_t>(l.offsets), scope.mutable_data(y.rows()), s.rows(),
                           s.d_model, s.d_ff, experts, top_k, dtype, kAutoTile});
  y.add_up(l.inverse);
  return {out.y, out.preact};
}

// out.grad_preact may be preact itself.
void layer_backward(const char* op, const ExpertShape& s, const at::Tensor& grad_in,
                    const Layer& layer, const at::Tensor& preact, const ExpertGrads& out) {
  const DType dtype = dtype_of(op, grad_in);
  LaunchScope scope(grad_in);
  const auto grad = grad_in.contiguous();
  const auto l = contiguous(layer);
  const auto experts = static_cast<int>(s.experts), top_k = static_cast<int>(s.top_k);

  void* workspace = scope.workspace(expert_hidden_bwd_workspace_bytes(s.rows(), s.d_ff), grad);
  scope.run(launch_expert_hidden_bwd,
            ExpertHiddenBwdArgs{scope.data(grad), scope.data(l.down), scope.data<float>(l.weights),
                                scope.data<int32_t>(l.order), scope.data<int32_t>(l.inverse),
                                scope.data<int32_t>(l.offsets), scope.data(preact),
                                scope.mutable_data(out.grad_preact), scope.mutable_data(out.hidden),
                                scope.mutable_data<float>(out.grad_weights), workspace, s.rows(),
                                s.d_model, s.d_ff, experts, top_k, dtype, kAutoTile});

  const SlotRows grad_x(s, out.grad_x);
  scope.run(launch_expert_input_bwd,
            ExpertInputBwdArgs{scope.data(out.grad_preact), scope.data(l.gate_up),
                               scope.data<int32_t>(l.order), scope.data<int32_t>(l.inverse),
                               scope.data<int32_t>(l.offsets), scope.mutable_data(grad_x.rows()),
                               s.rows(), s.d_model, s.d_ff, experts, top_k, dtype, kAutoTile});
  grad_x.add_up(l.inverse);
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> expert_mlp_bwd(
    const at::Tensor& grad, const at::Tensor& weights, const at::Tensor& gate_up,
    const at::Tensor& down, const at::Tensor& order, const at::Tensor& inverse,
    const at::Tensor& offsets, const at::Tensor& preact) {
  const auto s =
      check_expert_mlp_bwd(grad, weights, gate_up, down, order, inverse, offsets, preact);
  UNIPOOL_NVTX_RANGE("expert_mlp_bwd");
  const auto out = alloc_expert_mlp_bwd(s, grad, weights);
  layer_backward("expert_mlp_bwd", s, grad, {weights, gate_up, down, order, inverse, offsets},
                 preact.contiguous(), out);
  return {out.grad_x, out.grad_weights, out.grad_preact, out.hidden};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> expert_mlp_bwd_(
    const at::Tensor& grad, const at::Tensor& weights, const at::Tensor& gate_up,
    const at::Tensor& down, const at::Tensor& order, const at::Tensor& inverse,
    const at::Tensor& offsets, at::Tensor& preact) {
  const auto s =
      check_expert_mlp_bwd_(grad, weights, gate_up, down, order, inverse, offsets, preact);
  UNIPOOL_NVTX_RANGE("expert_mlp_bwd_");
  const auto out = alloc_expert_mlp_bwd(s, grad, weights, preact);
  layer_backward("expert_mlp_bwd_", s, grad, {weights, gate_up, down, order, inverse, offsets},
                 preact, out);
  return {out.grad_x, out.grad_weights, out.hidden};
}

}  // namespace
}  // namespace unipool::cuda

TORCH_LIBRARY_IMPL(unipool, CUDA, m) {
  m.impl("expert_mlp", &unipool::cuda::expert_mlp);
  m.impl("expert_mlp_bwd", &unipool::cuda::expert_mlp_bwd);
  m.impl("expert_mlp_bwd_", &unipool::cuda::expert_mlp_bwd_);
}
