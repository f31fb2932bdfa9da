// SPDX-License-Identifier: Apache-2.0
// The launchers of csrc/include/unipool with C linkage, for ctypes: the struct goes by pointer, its
// size lets Python check its own copy.
#include <cuda_runtime_api.h>

#include "unipool/dispatch.h"
#include "unipool/expert_mlp.h"
#include "unipool/grouped_mm.h"
#include "unipool/grouped_wgrad.h"
#include "unipool/router.h"

#define LAUNCHER(op, Args)                              \
  extern "C" int call_##op(const unipool::Args* args) { \
    return unipool::launch_##op(*args, nullptr);        \
  }                                                     \
  extern "C" size_t size_##op() { return sizeof(unipool::Args); }

LAUNCHER(norm_topk, NormTopkArgs)
LAUNCHER(norm_topk_bwd, NormTopkBwdArgs)
LAUNCHER(softmax_topk, SoftmaxTopkArgs)
LAUNCHER(softmax_topk_bwd, SoftmaxTopkBwdArgs)
LAUNCHER(dispatch_plan, DispatchPlanArgs)
LAUNCHER(permute, PermuteArgs)
LAUNCHER(unpermute, UnpermuteArgs)
LAUNCHER(unpermute_bwd, UnpermuteBwdArgs)
LAUNCHER(grouped_mm, GroupedMmArgs)
LAUNCHER(grouped_mm_bwd_a, GroupedMmArgs)
LAUNCHER(grouped_wgrad, GroupedWgradArgs)
LAUNCHER(expert_up, ExpertUpArgs)
LAUNCHER(expert_down, ExpertDownArgs)
LAUNCHER(expert_hidden_bwd, ExpertHiddenBwdArgs)
LAUNCHER(expert_input_bwd, ExpertInputBwdArgs)

extern "C" {

size_t workspace_router(int64_t tokens, int experts) {
  return unipool::router_workspace_bytes(tokens, experts);
}
size_t workspace_router_bwd(int64_t tokens) { return unipool::router_bwd_workspace_bytes(tokens); }
size_t workspace_dispatch_plan(int64_t slots, int experts) {
  return unipool::dispatch_plan_workspace_bytes(slots, experts);
}
size_t workspace_expert_hidden_bwd(int64_t rows, int64_t d_ff) {
  return unipool::expert_hidden_bwd_workspace_bytes(rows, d_ff);
}
size_t workspace_grouped_wgrad(int64_t rows, int experts, int64_t row_bytes) {
  return unipool::grouped_wgrad_workspace_bytes(rows, experts, row_bytes);
}

// Five multiprocessors with one block each (ld --wrap): the blocks of a persistent grid get several
// tiles, which small problems would not give those of a whole GPU.
cudaError_t __real_cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device);
cudaError_t __wrap_cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device) {
  if (attribute != cudaDevAttrMultiProcessorCount)
    return __real_cudaDeviceGetAttribute(value, attribute, device);
  *value = 5;
  return cudaSuccess;
}
cudaError_t __real_cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(
    int* blocks, const void* kernel, int threads, size_t shared, unsigned flags);
cudaError_t __wrap_cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(
    int* blocks, const void* kernel, int threads, size_t shared, unsigned flags) {
  const cudaError_t error = __real_cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(
      blocks, kernel, threads, shared, flags);
  if (error == cudaSuccess && *blocks > 1) *blocks = 1;
  return error;
}

}  // extern "C"
