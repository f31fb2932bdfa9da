// SPDX-License-Identifier: Apache-2.0
// The launcher of the weight gradient with C linkage, for ctypes.
#include "launcher.h"
#include "unipool/experts.h"

LAUNCHER(grouped_wgrad, GroupedWgradArgs)

extern "C" size_t emulated_grouped_wgrad_workspace(int64_t rows, int experts) {
  return unipool::grouped_wgrad_workspace_bytes(rows, experts);
}
