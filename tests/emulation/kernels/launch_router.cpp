// SPDX-License-Identifier: Apache-2.0
// The launchers of router with C linkage, for ctypes.
#include "launcher.h"
#include "unipool/router.h"

LAUNCHER(norm_topk, NormTopkArgs)
LAUNCHER(norm_topk_bwd, NormTopkBwdArgs)
LAUNCHER(softmax_topk, SoftmaxTopkArgs)
LAUNCHER(softmax_topk_bwd, SoftmaxTopkBwdArgs)

extern "C" size_t emulated_router_workspace(int64_t tokens, int experts) {
  return unipool::router_workspace_bytes(tokens, experts);
}
extern "C" size_t emulated_router_bwd_workspace(int64_t tokens) {
  return unipool::router_bwd_workspace_bytes(tokens);
}
