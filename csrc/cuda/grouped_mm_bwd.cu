// SPDX-License-Identifier: Apache-2.0
// The gradient of the rows of grouped_mm: the kernel of grouped_mm.cuh with matrices
// read across their rows. How it works and what it costs stands there.
#include "cuda/grouped_mm.cuh"

namespace unipool {

cudaError_t launch_grouped_mm_bwd_a(const GroupedMmArgs& args, cudaStream_t stream) {
  return launch_product<Major::kMn>(args, stream);
}

}  // namespace unipool
