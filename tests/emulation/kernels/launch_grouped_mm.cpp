// SPDX-License-Identifier: Apache-2.0
// The launchers of grouped products with C linkage, for ctypes.
#include "launcher.h"
#include "unipool/experts.h"

LAUNCHER(grouped_mm, GroupedMmArgs)
LAUNCHER(grouped_mm_bwd_a, GroupedMmArgs)
