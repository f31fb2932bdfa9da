// SPDX-License-Identifier: Apache-2.0
// Rows times the matrix of their expert.
#include "cuda/grouped_mm.cuh"

namespace unipool {

cudaError_t launch_grouped_mm(const GroupedMmArgs& args, cudaStream_t stream) {
  return launch_product<Major::kK>(args, stream);
}

}  // namespace unipool
