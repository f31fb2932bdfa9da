// SPDX-License-Identifier: Apache-2.0
// Rows times the matrix of their expert: the kernel of grouped_mm.cuh with matrices
// read along their rows. How it works and what it costs stands there.
#include "cuda/grouped_mm.cuh"

namespace unipool {

cudaError_t launch_grouped_mm(const GroupedMmArgs& args, cudaStream_t stream) {
  return launch_product<Major::kK>(args, stream);
}

}  // namespace unipool
