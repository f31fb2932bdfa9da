// SPDX-License-Identifier: Apache-2.0
// The launchers of the expert MLP's forward pass with C linkage, for ctypes.
#include "launcher.h"
#include "unipool/experts.h"

LAUNCHER(expert_up, ExpertUpArgs)
LAUNCHER(expert_down, ExpertDownArgs)
