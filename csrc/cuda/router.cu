// SPDX-License-Identifier: Apache-2.0
// Fused routers, docs/math.md (2), (4), (5), (7): scores, top-k, load and importance in one pass
// over the logits, and their backward in one more. No [T, M] tensor but the logits and their
// gradient. Outputs are written, never added to.
//
// A row is held by a group of lanes (device/row.cuh); a warp walks over its tokens with the next
// row already on its way. Sums over tokens are kept in registers, added up over the block, written
// to the workspace as one row a block, and summed by column_sums_kernel: no float atomics, and an
// order that depends on the shape only.
#include <algorithm>

#include "cuda/device/portable.cuh"
#include "cuda/device/row.cuh"
#include "cuda/device/scores.cuh"
#include "unipool/router.h"

namespace unipool {
namespace {

constexpr int kWarps = 8;
constexpr int kThreads = kWarps * kWarp;
constexpr int kMultiprocessors = 132;  // of an H100; a grid is one wave there
constexpr int kMaxBlocks = 3 * kMultiprocessors;
constexpr int kSumRows = 32;  // rows that column_sums_kernel takes at once

// Tokens of a group: first, first + stride, ... `first` of a warp's groups are neighbours.
template <class L>
struct TokenWalk {
  int64_t first;   // of the warp's first group
  int64_t stride;  // of the grid
  int group;
  int lane;

  __device__ __forceinline__ TokenWalk() {
    const int warp = threadIdx.x / kWarp;
    first = (int64_t(blockIdx.x) * kWarps + warp) * L::kGroups;
    stride = int64_t(gridDim.x) * kWarps * L::kGroups;
    group = threadIdx.x % kWarp / L::kLanes;
    lane = threadIdx.x % L::kLanes;
  }
};

// --- kernels: forward

struct Partials {
  float* importance;  // [blocks, M]
  int32_t* load;      // [blocks, M]
};

// sums: of each lane's experts over the warp's tokens. Adds them over the block into out [M].
// scratch: [kWarps, M] shared floats.
template <class L>
__device__ __forceinline__ void add_over_block(float (&sums)[L::kItems], float* scratch,
                                               int experts, float* out) {
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % L::kLanes;
#pragma unroll
  for (int i = 0; i < L::kItems; ++i) {
#pragma unroll
    for (int d = kWarp / 2; d >= L::kLanes; d /= 2) {
      sums[i] += __shfl_xor_sync(kFullMask, sums[i], d);
    }
    const int e = L::id(lane, i);
    if (threadIdx.x % kWarp < L::kLanes && e < experts) scratch[warp * experts + e] = sums[i];
  }
  __syncthreads();
#pragma unroll 1  // few rounds, once a block
  for (int e = threadIdx.x; e < experts; e += kThreads) {
    float sum = 0.f;
    for (int w = 0; w < kWarps; ++w) sum += scratch[w * experts + e];
    out[e] = sum;
  }
}

// Chooses k of a row's experts by key. Slot j gets the j-th id and its key.
template <class L>
__device__ __forceinline__ void choose(uint32_t (&key)[L::kItems], int lane, int top_k,
                                       Slots<L, int>& ids, Slots<L, uint32_t>& keys) {
  for (int j = 0; j < top_k; ++j) {
    uint32_t best;
    const int id = take_best<L>(key, lane, best);
    ids.set(lane, j, id);
    keys.set(lane, j, best);
  }
}

// Reads T * M * sizeof(T) bytes, writes 8 * T * k, and 8 * M a block.
// Shared memory: load [M] i32, then scratch [kWarps, M] f32.
template <class L, class Score>
__device__ __forceinline__ void topk_rows(const RouterArgs& a, const Score& score, Partials out) {
  using T = typename L::T;
  const int experts = a.num_experts;
  int32_t* load = dynamic_shared<int32_t>();
  float* scratch = reinterpret_cast<float*>(load + experts);
#pragma unroll 1
  for (int e = threadIdx.x; e < experts; e += kThreads) load[e] = 0;
  __syncthreads();

  const TokenWalk<L> walk;
  const int lane = walk.lane;
  const T* logits = static_cast<const T*>(a.logits);
  const uint32_t open = open_items<L>(a.mask, experts, lane);
  const auto row_of = [&](int64_t token) {
    return token < a.tokens ? logits + token * experts : nullptr;
  };
  float importance[L::kItems] = {};
  RawRow<L> next;
  next.load(row_of(walk.first + walk.group), experts, lane);

  for (int64_t first = walk.first; first < a.tokens; first += walk.stride) {
    const int64_t token = first + walk.group;
    const uint32_t open_here = token < a.tokens ? open : 0;
    float s[L::kItems];
    next.unpack(s);
    next.load(row_of(token + walk.stride), experts, lane);
    const auto row = score.template scores<L>(s, open_here);

    uint32_t key[L::kItems];
#pragma unroll
    for (int i = 0; i < L::kItems; ++i) {
      importance[i] += s[i];
      const bool biased = a.bias != nullptr && is_open(open_here, i);
      const float b = biased ? __ldg(a.bias + L::id(lane, i)) : 0.f;
      key[i] = is_open(open_here, i) ? order_key(s[i] + b) : 0;
    }
    Slots<L, int> ids;
    Slots<L, uint32_t> keys;
    choose<L>(key, lane, a.top_k, ids, keys);

    Slots<L, float> w;
#pragma unroll
    for (int i = 0; i < Slots<L, int>::kEach; ++i) {
      const bool used = ids.slot(lane, i) < a.top_k && ids.v[i] >= 0;
      w.v[i] = 0.f;
      if (used) {  // a biased key does not tell the score
        w.v[i] = a.bias == nullptr ? score_of(keys.v[i])
                                   : score.score(to_float(logits[token * experts + ids.v[i]]), row);
        atomicAdd(&load[ids.v[i]], 1);
      }
    }
    w = score.template finish_weights<L>(w);
#pragma unroll
    for (int i = 0; i < Slots<L, int>::kEach; ++i) {
      const int j = ids.slot(lane, i);
      if (j < a.top_k && token < a.tokens) {
        a.weights[token * a.top_k + j] = w.v[i];
        a.experts[token * a.top_k + j] = ids.v[i];
      }
    }
  }

  const int64_t base = int64_t(blockIdx.x) * experts;
  add_over_block<L>(importance, scratch, experts, out.importance + base);
  // The barrier in add_over_block also completed the load.
#pragma unroll 1
  for (int e = threadIdx.x; e < experts; e += kThreads) out.load[base + e] = load[e];
}

template <class L>
__global__ __launch_bounds__(kThreads, L::kResident) void norm_topk_kernel(const NormTopkArgs args,
                                                                           const Partials out) {
  topk_rows<L>(args.router, NormScore{__ldg(args.scale) * args.calibration, args.eps}, out);
}

template <class L>
__global__ __launch_bounds__(kThreads,
                             L::kResident) void softmax_topk_kernel(const SoftmaxTopkArgs args,
                                                                    const Partials out) {
  topk_rows<L>(args.router, SoftmaxScore{args.renormalize}, out);
}

// out[c] = factor * sum of partial[r][c] over r, row r in group r % kSumRows, groups in order.
template <class A>
__device__ __forceinline__ void column_sum(const A* partial, int rows, int columns, A factor,
                                           A* out) {
  __shared__ A sums[kSumRows * kWarp];
  const int c = blockIdx.x * kWarp + threadIdx.x;
  A sum = 0;
  if (c < columns) {
    for (int r = threadIdx.y; r < rows; r += kSumRows) sum += partial[int64_t(r) * columns + c];
  }
  sums[threadIdx.y * kWarp + threadIdx.x] = sum;
  __syncthreads();
  if (threadIdx.y != 0 || c >= columns) return;
  A total = 0;
  for (int g = 0; g < kSumRows; ++g) total += sums[g * kWarp + threadIdx.x];
  out[c] = factor * total;
}

// Block (32 columns, kSumRows); blockIdx.y: 0 importance, 1 load.
__global__ __launch_bounds__(kWarp* kSumRows) void column_sums_kernel(Partials partial, int rows,
                                                                      int experts,
                                                                      float* importance,
                                                                      int32_t* load) {
  if (blockIdx.y == 0) {
    column_sum<float>(partial.importance, rows, experts, 1.f, importance);
  } else {
    column_sum<int32_t>(partial.load, rows, experts, 1, load);
  }
}

// --- kernels: backward

// Reads T * (M * sizeof(T) + 8 * k) bytes, writes T * M * sizeof(T). Returns the sum over the
// warp's tokens of what Score::backward returns; it is the same in all lanes of a group.
template <class L, class Score>
__device__ __forceinline__ float topk_rows_bwd(const RouterBwdArgs& a, const Score& score) {
  using T = typename L::T;
  const int experts = a.num_experts;
  const TokenWalk<L> walk;
  const int lane = walk.lane;
  const T* logits = static_cast<const T*>(a.logits);
  T* grad_logits = static_cast<T*>(a.grad_logits);
  const uint32_t open = open_items<L>(a.mask, experts, lane);
  const auto row_of = [&](int64_t token) {
    return token < a.tokens ? logits + token * experts : nullptr;
  };
  float grad_importance[L::kItems];
#pragma unroll
  for (int i = 0; i < L::kItems; ++i) {
    const bool given = a.grad_importance != nullptr && is_open(open, i);
    grad_importance[i] = given ? __ldg(a.grad_importance + L::id(lane, i)) : 0.f;
  }
  float total = 0.f;
  RawRow<L> next;
  next.load(row_of(walk.first + walk.group), experts, lane);

  for (int64_t first = walk.first; first < a.tokens; first += walk.stride) {
    const int64_t token = first + walk.group;
    const bool active = token < a.tokens;
    const uint32_t open_here = active ? open : 0;
    float z[L::kItems], g[L::kItems];
    next.unpack(z);
    next.load(row_of(token + walk.stride), experts, lane);
    const auto row = score.template measure<L>(z, open_here);
#pragma unroll
    for (int i = 0; i < L::kItems; ++i) g[i] = active ? grad_importance[i] : 0.f;

    if (a.grad_weights != nullptr) {
      Slots<L, int> ids;
      Slots<L, float> grads, chosen;
#pragma unroll
      for (int i = 0; i < Slots<L, int>::kEach; ++i) {
        const int j = ids.slot(lane, i);
        const int64_t slot = token * a.top_k + j;
        ids.v[i] = active && j < a.top_k ? __ldg(a.experts + slot) : -1;
        const bool used = unsigned(ids.v[i]) < unsigned(experts);
        grads.v[i] = used ? __ldg(a.grad_weights + slot) : 0.f;
        chosen.v[i] = used ? score.score(to_float(logits[token * experts + ids.v[i]]), row) : 0.f;
      }
      grads = score.template start_grads<L>(grads, chosen);
      for (int j = 0; j < a.top_k; ++j) {
        const int id = ids.get(j);
        const float grad = grads.get(j);
#pragma unroll
        for (int i = 0; i < L::kItems; ++i) g[i] += id == L::id(lane, i) ? grad : 0.f;
      }
    }
    total += score.template backward<L>(z, g, open_here, row);
    if (active) store_row<L>(z, grad_logits + token * experts, experts, lane);
  }
  return total;
}

template <class L>
__global__ __launch_bounds__(kThreads,
                             L::kResidentBwd) void norm_topk_bwd_kernel(const NormTopkBwdArgs args,
                                                                        float* partial_scale) {
  const NormScore score{__ldg(args.scale) * args.calibration, args.eps};
  float total = topk_rows_bwd<L>(args.router, score);
  __shared__ float sums[kWarps];
#pragma unroll
  for (int d = kWarp / 2; d >= L::kLanes; d /= 2) total += __shfl_xor_sync(kFullMask, total, d);
  if (threadIdx.x % kWarp == 0) sums[threadIdx.x / kWarp] = total;
  __syncthreads();
  if (threadIdx.x != 0) return;
  float sum = 0.f;
  for (int w = 0; w < kWarps; ++w) sum += sums[w];
  partial_scale[blockIdx.x] = sum;
}

template <class L>
__global__ __launch_bounds__(kThreads, L::kResidentBwd) void softmax_topk_bwd_kernel(
    const SoftmaxTopkBwdArgs args) {
  topk_rows_bwd<L>(args.router, SoftmaxScore{args.renormalize});
}

// grad_scale = calibration * sum over blocks
__global__ __launch_bounds__(kWarp* kSumRows) void grad_scale_kernel(const float* partial, int rows,
                                                                     float calibration,
                                                                     float* grad_scale) {
  column_sum<float>(partial, rows, 1, calibration, grad_scale);
}

// --- launchers

// Calls f(RowLayout) with the layout for M experts of type T. Few lanes a row where M is small:
// the rounds of the top-k then serve several tokens at once.
template <class T, class F>
cudaError_t with_layout(int experts, bool aligned, F f) {
  constexpr int kVec = kVectorBytes / sizeof(T);
  if (!aligned) {
    return experts <= 256 ? f(RowLayout<T, 32, 8, 1>{}) : f(RowLayout<T, 32, 32, 1>{});
  }
  if constexpr (kVec == 4) {
    if (experts <= 96) return f(RowLayout<T, 8, 12, kVec>{});
    if (experts <= 128) return f(RowLayout<T, 16, 8, kVec>{});
    if (experts <= 384) return f(RowLayout<T, 32, 12, kVec>{});
  } else {
    if (experts <= 128) return f(RowLayout<T, 16, 8, kVec>{});
    if (experts <= 512) return f(RowLayout<T, 32, 16, kVec>{});
  }
  return f(RowLayout<T, 32, 32, kVec>{});
}

template <class F>
cudaError_t with_layout(DType dtype, int experts, const void* logits, const void* grad_logits,
                        F f) {
  const int64_t row_bytes = experts * int64_t(size_of(dtype));
  const bool aligned = is_aligned(logits, row_bytes) && is_aligned(grad_logits, row_bytes);
  switch (dtype) {
    case DType::kFloat32:
      return with_layout<float>(experts, aligned, f);
    case DType::kFloat16:
      return with_layout<__half>(experts, aligned, f);
    case DType::kBFloat16:
      return with_layout<__nv_bfloat16>(experts, aligned, f);
  }
  return cudaErrorInvalidValue;
}

template <class L>
int blocks_for(int64_t tokens, int resident) {
  const int64_t wanted = ceil_div(tokens, int64_t(kWarps) * L::kGroups);
  return int(std::min<int64_t>(wanted, resident * kMultiprocessors));
}

bool supported(int64_t tokens, int experts, int top_k) {
  return tokens >= 0 && experts >= 1 && experts <= kExpertLimit && top_k >= 1 &&
         top_k <= std::min(experts, kTopKLimit);
}

template <class Args, class KernelOf>
cudaError_t launch_topk(const Args& args, KernelOf kernel_of, cudaStream_t stream) {
  const RouterArgs& a = args.router;
  if (!supported(a.tokens, a.num_experts, a.top_k)) return cudaErrorInvalidValue;
  return with_layout(a.dtype, a.num_experts, a.logits, nullptr, [&](auto layout) {
    using L = decltype(layout);
    const int blocks = blocks_for<L>(a.tokens, L::kResident);
    float* sums = static_cast<float*>(a.workspace);
    const Partials partials{sums,
                            reinterpret_cast<int32_t*>(sums + int64_t(blocks) * a.num_experts)};
    if (blocks > 0) {
      const size_t smem = sizeof(float) * a.num_experts * (1 + kWarps);
      const cudaError_t error =
          launch(kernel_of(layout), dim3(blocks), dim3(kThreads), smem, stream, args, partials);
      if (error != cudaSuccess) return error;
    }
    return launch(column_sums_kernel, dim3(ceil_div(a.num_experts, kWarp), 2),
                  dim3(kWarp, kSumRows), 0, stream, partials, blocks, a.num_experts, a.importance,
                  a.load);
  });
}

}  // namespace

size_t router_workspace_bytes(int64_t tokens, int num_experts) {
  const int64_t blocks = std::min<int64_t>(ceil_div(tokens, int64_t(kWarps)), kMaxBlocks);
  return size_t(blocks) * num_experts * (sizeof(float) + sizeof(int32_t));
}

size_t router_bwd_workspace_bytes(int64_t tokens) {
  return std::min<int64_t>(ceil_div(tokens, int64_t(kWarps)), kMaxBlocks) * sizeof(float);
}

cudaError_t launch_norm_topk(const NormTopkArgs& args, cudaStream_t stream) {
  const auto kernel_of = [](auto layout) { return norm_topk_kernel<decltype(layout)>; };
  return launch_topk(args, kernel_of, stream);
}

cudaError_t launch_softmax_topk(const SoftmaxTopkArgs& args, cudaStream_t stream) {
  const auto kernel_of = [](auto layout) { return softmax_topk_kernel<decltype(layout)>; };
  return launch_topk(args, kernel_of, stream);
}

cudaError_t launch_norm_topk_bwd(const NormTopkBwdArgs& args, cudaStream_t stream) {
  const RouterBwdArgs& a = args.router;
  if (!supported(a.tokens, a.num_experts, a.top_k)) return cudaErrorInvalidValue;
  return with_layout(a.dtype, a.num_experts, a.logits, a.grad_logits, [&](auto layout) {
    using L = decltype(layout);
    const int blocks = blocks_for<L>(a.tokens, L::kResidentBwd);
    float* partial_scale = static_cast<float*>(a.workspace);
    if (blocks > 0) {
      const cudaError_t error = launch(norm_topk_bwd_kernel<L>, dim3(blocks), dim3(kThreads), 0,
                                       stream, args, partial_scale);
      if (error != cudaSuccess) return error;
    }
    return launch(grad_scale_kernel, dim3(1), dim3(kWarp, kSumRows), 0, stream, partial_scale,
                  blocks, args.calibration, args.grad_scale);
  });
}

cudaError_t launch_softmax_topk_bwd(const SoftmaxTopkBwdArgs& args, cudaStream_t stream) {
  const RouterBwdArgs& a = args.router;
  if (!supported(a.tokens, a.num_experts, a.top_k)) return cudaErrorInvalidValue;
  if (a.tokens == 0) return cudaSuccess;
  return with_layout(a.dtype, a.num_experts, a.logits, a.grad_logits, [&](auto layout) {
    using L = decltype(layout);
    return launch(softmax_topk_bwd_kernel<L>, dim3(blocks_for<L>(a.tokens, L::kResidentBwd)),
                  dim3(kThreads), 0, stream, args);
  });
}

}  // namespace unipool
