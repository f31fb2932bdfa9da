// SPDX-License-Identifier: Apache-2.0
// grouped_mm on CUDA: check, allocate, launch.
#include <torch/library.h>

#include "cuda/op.h"
#include "unipool/grouped_mm.h"

namespace unipool::cuda {
namespace {

using GroupedMmLauncher = cudaError_t (*)(const GroupedMmArgs&, cudaStream_t);

at::Tensor row_products(const char* op, GroupedMmLauncher launch, const GroupedShape& s,
                        const at::Tensor& a_in, const at::Tensor& b_in,
                        const at::Tensor& offsets_in, at::Tensor out) {
  LaunchScope scope(a_in);
  const auto a = a_in.contiguous(), b = b_in.contiguous(), offsets = offsets_in.contiguous();
  scope.run(launch, GroupedMmArgs{scope.data(a), scope.data(b), scope.data<int32_t>(offsets),
                                  scope.mutable_data(out), s.rows, s.n, s.k,
                                  static_cast<int>(s.experts), dtype_of(op, a), kAutoTile});
  return out;
}

at::Tensor grouped_mm(const at::Tensor& a, const at::Tensor& b, const at::Tensor& offsets) {
  const auto s = check_grouped_mm(a, b, offsets);
  UNIPOOL_NVTX_RANGE("grouped_mm");
  return row_products("grouped_mm", launch_grouped_mm, s, a, b, offsets, alloc_grouped_mm(s, a));
}

at::Tensor grouped_mm_bwd_a(const at::Tensor& grad, const at::Tensor& b,
                            const at::Tensor& offsets) {
  const auto s = check_grouped_mm_bwd_a(grad, b, offsets);
  UNIPOOL_NVTX_RANGE("grouped_mm_bwd_a");
  return row_products("grouped_mm_bwd_a", launch_grouped_mm_bwd_a, s, grad, b, offsets,
                      alloc_grouped_mm_bwd_a(s, grad));
}

}  // namespace
}  // namespace unipool::cuda

TORCH_LIBRARY_IMPL(unipool, CUDA, m) {
  m.impl("grouped_mm", &unipool::cuda::grouped_mm);
  m.impl("grouped_mm_bwd_a", &unipool::cuda::grouped_mm_bwd_a);
}
