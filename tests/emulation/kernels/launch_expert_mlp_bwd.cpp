// SPDX-License-Identifier: Apache-2.0
// The launchers of the expert MLP's backward pass with C linkage, for ctypes.
#include "launcher.h"
#include "unipool/experts.h"

LAUNCHER(expert_hidden_bwd, ExpertHiddenBwdArgs)
LAUNCHER(expert_input_bwd, ExpertInputBwdArgs)

extern "C" size_t emulated_expert_hidden_bwd_workspace(int64_t rows, int64_t d_ff) {
  return unipool::expert_hidden_bwd_workspace_bytes(rows, d_ff);
}
