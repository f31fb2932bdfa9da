// SPDX-License-Identifier: Apache-2.0
// The weight gradient on CUDA: check, allocate, launch once or, for many segments, several times.
#include <torch/library.h>

#include <algorithm>
#include <limits>
#include <vector>

#include "cuda/op.h"
#include "unipool/grouped_wgrad.h"

namespace unipool::cuda {
namespace {

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
    const size_t most = std::min(count(), first + kWgradSegmentLimit);
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
  auto out = alloc_grouped_wgrad(s, grad, sum_type);
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
  check_wgrad_sum(sum, s, grad, input, order, offsets);
  LaunchScope scope(sum);
  UNIPOOL_NVTX_RANGE("grouped_wgrad_");
  const Segments segments(grad, input, order, offsets, grad_top_k, input_top_k);
  for (size_t first = 0, end; first < segments.count(); first = end) {
    end = segments.end_of_launch(first);
    launch_wgrad("grouped_wgrad_", scope, s, segments, first, end, sum, true);
  }
}

}  // namespace
}  // namespace unipool::cuda

TORCH_LIBRARY_IMPL(unipool, CUDA, m) {
  m.impl("grouped_wgrad", &unipool::cuda::grouped_wgrad);
  m.impl("grouped_wgrad_", &unipool::cuda::grouped_wgrad_);
}
