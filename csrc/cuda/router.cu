// SPDX-License-Identifier: Apache-2.0
// Fused routers, docs/math.md (2), (4), (5), (7): scores, top-k, load and importance in one pass
// over the logits, and their backward in one more. No [T, M] tensor but the logits and their
// gradient. Outputs are written, never added to.
//
//   {norm,softmax}_topk      A group of 8, 16 or 32 lanes holds a token's row in registers
//                            (device/row.cuh); a warp walks over its tokens with the next row
//                            already on its way. Scores by shuffles over the group, top-k by k
//                            rounds of its greatest key. Importance is summed in registers, load by
//                            integer atomics in shared memory; a block writes both to the workspace
//                            as one row of partial sums.
//   column_sums              adds these rows, in an order that depends on the shape only: no float
//                            atomics.
//   {norm,softmax}_topk_bwd  reads the logits again, so nothing is saved but the ids, and adds the
//   k
//                            gradients of the slots to the registers of the chosen experts. The
//                            gradient of the scale: a partial sum per block, then
//                            grad_scale.
//
// Barriers: two per block forward, at its start and end; one backward (norm). None between tokens.
// Shared memory: 36 M bytes forward (load and 8 warps' importance), 8 numbers backward.
// Occupancy: blocks of 256 threads, 3 per multiprocessor for up to 12 experts per lane (forward; 8
// backward), 2 up to 16, else 1, which __launch_bounds__ holds the registers to.
// Traffic: forward reads T M logits and writes 8 T k bytes; backward reads these and the ids, and
// writes T M. Partial sums are 8 M bytes per block.
#include <algorithm>

#include "cuda/device/kernel.cuh"
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

// The rows of a group of lanes: of tokens first, first + stride, ... Groups of a warp begin with
// neighbours, and all of them go on while one has a token. The next row is always on its way.
template <class L>
class RowWalk {
  using T = typename L::T;

 public:
  const int lane = threadIdx.x % L::kLanes;

  __device__ __forceinline__ RowWalk(const void* logits, int64_t tokens, int experts)
      : logits_(static_cast<const T*>(logits)), tokens_(tokens), experts_(experts) {
    const int64_t warp = int64_t(blockIdx.x) * kWarps + threadIdx.x / kWarp;
    first_ = warp * L::kGroups;
    next_.load(row_of(first_ + group()), experts_, lane);
  }

  // The next token's row, zeros for a group without one; false if no group of the warp has one.
  __device__ __forceinline__ bool next(float (&z)[L::kItems]) {
    if (first_ >= tokens_) return false;
    token_ = first_ + group();
    first_ += int64_t(gridDim.x) * kWarps * L::kGroups;
    next_.unpack(z);
    next_.load(row_of(first_ + group()), experts_, lane);
    return true;
  }
  __device__ __forceinline__ int64_t token() const { return token_; }
  __device__ __forceinline__ bool active() const { return token_ < tokens_; }
  // A logit of this token, read again.
  __device__ __forceinline__ float logit(int expert) const {
    return to_float(logits_[token_ * experts_ + expert]);
  }

 private:
  __device__ __forceinline__ static int group() { return threadIdx.x % kWarp / L::kLanes; }
  __device__ __forceinline__ const T* row_of(int64_t token) const {
    return token < tokens_ ? logits_ + token * experts_ : nullptr;
  }

  const T* logits_;
  int64_t tokens_, first_, token_ = 0;
  int experts_;
  RawRow<L> next_;
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
#pragma unroll 1  // few rounds, once per block
  for (int e = threadIdx.x; e < experts; e += kThreads) {
    float sum = 0.f;
    for (int w = 0; w < kWarps; ++w) sum += scratch[w * experts + e];
    out[e] = sum;
  }
}

// What a token's slots hold: ids, -1 in slots without an expert, and the keys they were chosen by.
template <class L>
struct Choice {
  Slots<L, int> ids;
  Slots<L, uint32_t> keys;
};

// Chooses k of a row's open experts by score plus bias (4).
template <class L>
__device__ __forceinline__ Choice<L> choose(const float (&s)[L::kItems], uint32_t open, int lane,
                                            const float* bias, int top_k) {
  uint32_t key[L::kItems];
#pragma unroll
  for (int i = 0; i < L::kItems; ++i) {
    const bool biased = bias != nullptr && is_open(open, i);
    const float b = biased ? __ldg(bias + L::id(lane, i)) : 0.f;
    key[i] = is_open(open, i) ? order_key(s[i] + b) : 0;
  }
  Choice<L> choice;
  for (int j = 0; j < top_k; ++j) {
    uint32_t best;
    const int id = take_best<L>(key, lane, best);
    choice.ids.set(lane, j, id);
    choice.keys.set(lane, j, best);
  }
  return choice;
}

// The weights of the chosen, 0 in slots without an expert. A key tells the score, unless it is
// biased: then it is computed again from the logit. Where a score of 0 means silence, the slot
// loses its expert.
template <class L, class Score>
__device__ __forceinline__ Slots<L, float> weights_of(const RouterArgs& a, const Score& score,
                                                      const typename Score::Row& row,
                                                      const RowWalk<L>& walk, Choice<L>& choice) {
  Slots<L, float> w;
#pragma unroll
  for (int i = 0; i < w.kEach; ++i) {
    const int id = choice.ids.v[i];
    w.v[i] = 0.f;
    if (w.slot(walk.lane, i) >= a.top_k || id < 0) continue;
    w.v[i] = a.bias == nullptr ? score_of(choice.keys.v[i]) : score.score(walk.logit(id), row);
    if (Score::kZeroIsSilent && w.v[i] == 0.f) choice.ids.v[i] = -1;
  }
  return score.template finish_weights<L>(w);
}

// Writes a token's slots and counts them in `load`, [M] in shared memory.
template <class L>
__device__ __forceinline__ void store_slots(const RouterArgs& a, const RowWalk<L>& walk,
                                            const Slots<L, int>& ids, const Slots<L, float>& w,
                                            int32_t* load) {
#pragma unroll
  for (int i = 0; i < w.kEach; ++i) {
    const int j = w.slot(walk.lane, i);
    if (j >= a.top_k || !walk.active()) continue;
    const int64_t slot = walk.token() * a.top_k + j;
    a.weights[slot] = w.v[i];
    a.experts[slot] = ids.v[i];
    if (ids.v[i] >= 0) atomicAdd(&load[ids.v[i]], 1);
  }
}

// Shared memory: load [M] i32, then scratch [kWarps, M] f32.
template <class L, class Score>
__device__ __forceinline__ void topk_rows(const RouterArgs& a, const Score& score, Partials out) {
  const int experts = a.num_experts;
  int32_t* load = dynamic_shared<int32_t>();
  float* scratch = reinterpret_cast<float*>(load + experts);
#pragma unroll 1
  for (int e = threadIdx.x; e < experts; e += kThreads) load[e] = 0;
  __syncthreads();

  RowWalk<L> walk(a.logits, a.tokens, experts);
  const uint32_t open = open_items<L>(a.mask, experts, walk.lane);
  float s[L::kItems], importance[L::kItems] = {};
  while (walk.next(s)) {
    const uint32_t open_here = walk.active() ? open : 0;
    const auto row = score.template scores<L>(s, open_here);
#pragma unroll
    for (int i = 0; i < L::kItems; ++i) importance[i] += s[i];
    auto choice = choose<L>(s, open_here, walk.lane, a.bias, a.top_k);
    const auto w = weights_of<L>(a, score, row, walk, choice);
    store_slots<L>(a, walk, choice.ids, w, load);
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

// Adds the gradients of a token's weights to g, those of the scores. Ids outside [0, M) have none.
template <class L, class Score>
__device__ __forceinline__ void add_slot_grads(const RouterBwdArgs& a, const Score& score,
                                               const typename Score::Row& row,
                                               const RowWalk<L>& walk, float (&g)[L::kItems]) {
  Slots<L, int> ids;
  Slots<L, float> grads, chosen;
#pragma unroll
  for (int i = 0; i < ids.kEach; ++i) {
    const int j = ids.slot(walk.lane, i);
    const int64_t slot = walk.token() * a.top_k + j;
    ids.v[i] = walk.active() && j < a.top_k ? __ldg(a.experts + slot) : -1;
    const bool used = unsigned(ids.v[i]) < unsigned(a.num_experts);
    grads.v[i] = used ? __ldg(a.grad_weights + slot) : 0.f;
    chosen.v[i] = used ? score.score(walk.logit(ids.v[i]), row) : 0.f;
  }
  grads = score.template start_grads<L>(grads, chosen);
  for (int j = 0; j < a.top_k; ++j) {
    const int id = ids.get(j);
    const float grad = grads.get(j);
#pragma unroll
    for (int i = 0; i < L::kItems; ++i) g[i] += id == L::id(walk.lane, i) ? grad : 0.f;
  }
}

// Returns the sum over the warp's tokens of what Score::backward returns; it is the same in all
// lanes of a group.
template <class L, class Score>
__device__ __forceinline__ float topk_rows_bwd(const RouterBwdArgs& a, const Score& score) {
  const int experts = a.num_experts;
  auto* grad_logits = static_cast<typename L::T*>(a.grad_logits);
  RowWalk<L> walk(a.logits, a.tokens, experts);
  const uint32_t open = open_items<L>(a.mask, experts, walk.lane);
  float grad_importance[L::kItems];
#pragma unroll
  for (int i = 0; i < L::kItems; ++i) {
    const bool given = a.grad_importance != nullptr && is_open(open, i);
    grad_importance[i] = given ? __ldg(a.grad_importance + L::id(walk.lane, i)) : 0.f;
  }
  float total = 0.f, z[L::kItems];
  while (walk.next(z)) {
    const uint32_t open_here = walk.active() ? open : 0;
    const auto row = score.template measure<L>(z, open_here);
    float g[L::kItems];
#pragma unroll
    for (int i = 0; i < L::kItems; ++i) g[i] = walk.active() ? grad_importance[i] : 0.f;
    if (a.grad_weights != nullptr) add_slot_grads<L>(a, score, row, walk, g);
    total += score.template backward<L>(z, g, open_here, row);
    if (walk.active()) store_row<L>(z, grad_logits + walk.token() * experts, experts, walk.lane);
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

// Calls f(RowLayout) with the layout for M experts of type T. Few lanes per row where M is small:
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
