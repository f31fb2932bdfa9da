// SPDX-License-Identifier: Apache-2.0
// dispatch_plan, permute, unpermute and its backward on CUDA: check, allocate, launch.
#include <ATen/ops/cat.h>
#include <torch/library.h>

#include <tuple>
#include <vector>

#include "cuda/op.h"
#include "unipool/dispatch.h"

namespace unipool::cuda {
namespace {

// The ids of each layer, contiguous; of all layers in one tensor where there are too many.
std::vector<at::Tensor> segments(at::TensorList experts) {
  if (experts.size() > kPlanSegmentLimit) return {at::cat(experts)};
  std::vector<at::Tensor> result;
  for (const at::Tensor& layer : experts) result.push_back(layer.contiguous());
  return result;
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> dispatch_plan(at::TensorList experts,
                                                             int64_t num_experts) {
  const auto shape = check_dispatch_plan(experts, num_experts);
  LaunchScope scope(experts[0]);
  UNIPOOL_NVTX_RANGE("dispatch_plan");
  const auto layers = segments(experts);
  const auto out = alloc_dispatch_plan(shape, experts[0]);
  DispatchPlanArgs args{};
  for (const at::Tensor& layer : layers) {
    args.experts[args.segments] = scope.data<int32_t>(layer);
    args.slots[args.segments++] = static_cast<int32_t>(layer.numel());
  }
  args.num_experts = static_cast<int>(num_experts);
  args.order = scope.mutable_data<int32_t>(out.order);
  args.inverse = scope.mutable_data<int32_t>(out.inverse);
  args.offsets = scope.mutable_data<int32_t>(out.offsets);
  args.workspace =
      scope.workspace(dispatch_plan_workspace_bytes(shape.slots(), args.num_experts), experts[0]);
  scope.run(launch_dispatch_plan, args);
  return {out.order, out.inverse, out.offsets};
}

std::tuple<at::Tensor, at::Tensor> unpermute_bwd(const at::Tensor& grad_in, const at::Tensor& y_in,
                                                 const at::Tensor& order_in,
                                                 const at::Tensor& inverse_in,
                                                 const at::Tensor& weights_in) {
  const auto s = check_unpermute_bwd(grad_in, y_in, order_in, inverse_in, weights_in);
  LaunchScope scope(y_in);
  UNIPOOL_NVTX_RANGE("unpermute_bwd");
  const auto grad = grad_in.contiguous(), y = y_in.contiguous(), order = order_in.contiguous();
  const auto inverse = inverse_in.contiguous(), weights = weights_in.contiguous();
  const auto out = alloc_unpermute_bwd(s, y, weights);
  scope.run(
      launch_unpermute_bwd,
      UnpermuteBwdArgs{scope.data(grad), scope.data(y), scope.data<int32_t>(order),
                       scope.data<int32_t>(inverse), scope.data<float>(weights),
                       scope.mutable_data(out.grad_y), scope.mutable_data<float>(out.grad_weights),
                       s.tokens, s.width, static_cast<int>(s.top_k), dtype_of("unpermute_bwd", y)});
  return {out.grad_y, out.grad_weights};
}

at::Tensor permute(const at::Tensor& x_in, const at::Tensor& order_in, int64_t top_k) {
  const auto s = check_permute(x_in, order_in, top_k);
  LaunchScope scope(x_in);
  UNIPOOL_NVTX_RANGE("permute");
  const auto x = x_in.contiguous(), order = order_in.contiguous();
  auto y = alloc_permute(s, x);
  scope.run(launch_permute,
            PermuteArgs{scope.data(x), scope.data<int32_t>(order), scope.mutable_data(y), s.rows,
                        s.width * static_cast<int64_t>(x.element_size()), static_cast<int>(top_k)});
  return y;
}

at::Tensor unpermute(const at::Tensor& y, const at::Tensor& inverse,
                     const OptionalTensor& weights) {
  const auto s = check_unpermute(y, inverse, weights);
  UNIPOOL_NVTX_RANGE("unpermute");
  auto out = alloc_unpermute(s, y);
  unpermute_into(out, y, inverse, weights);
  return out;
}

}  // namespace

void unpermute_into(const at::Tensor& out, const at::Tensor& y_in, const at::Tensor& inverse_in,
                    const OptionalTensor& weights_in) {
  LaunchScope scope(y_in);
  const auto y = y_in.contiguous(), inverse = inverse_in.contiguous();
  const auto weights = contiguous(weights_in);
  scope.run(launch_unpermute,
            UnpermuteArgs{scope.data(y), scope.data<int32_t>(inverse), scope.data<float>(weights),
                          scope.mutable_data(out), inverse.size(0), y.size(1),
                          static_cast<int>(inverse.size(1)), dtype_of("unpermute", y)});
}

}  // namespace unipool::cuda

TORCH_LIBRARY_IMPL(unipool, CUDA, m) {
  m.impl("dispatch_plan", &unipool::cuda::dispatch_plan);
  m.impl("permute", &unipool::cuda::permute);
  m.impl("unpermute", &unipool::cuda::unpermute);
  m.impl("unpermute_bwd", &unipool::cuda::unpermute_bwd);
}
