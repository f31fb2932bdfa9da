// SPDX-License-Identifier: Apache-2.0
// The launchers of dispatch with C linkage, for ctypes.
#include "launcher.h"
#include "unipool/dispatch.h"

LAUNCHER(dispatch_plan, DispatchPlanArgs)
LAUNCHER(permute, PermuteArgs)
LAUNCHER(unpermute, UnpermuteArgs)
LAUNCHER(unpermute_bwd, UnpermuteBwdArgs)

extern "C" size_t emulated_dispatch_plan_workspace(int64_t slots, int experts) {
  return unipool::dispatch_plan_workspace_bytes(slots, experts);
}
