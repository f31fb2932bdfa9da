// SPDX-License-Identifier: Apache-2.0
// How far the ops go, once for checks, kernels and Python (unipool._C.limits()).
#pragma once

namespace unipool {

constexpr int kExpertLimit = 1024;  // M, of the CUDA kernels; the CPU has no such limit
constexpr int kTopKLimit = 16;      // k of the routers; the dispatch kernels take any

// Layers of one launch; more are given to dispatch_plan as one, and to grouped_wgrad in turn. Its
// kernel then has 5 KiB of parameters: more than 4 KiB need CUDA 12.1.
constexpr int kPlanSegmentLimit = 128;
constexpr int kWgradSegmentLimit = 128;

}  // namespace unipool
