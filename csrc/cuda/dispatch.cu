// SPDX-License-Identifier: Apache-2.0
// Token slots sorted by expert (a stable counting sort over the slots of all layers), and rows
// moved between token order and sorted order. Outputs are written, never added to; nothing waits
// for the host, and no result depends on the order in which blocks run.
//
//   dispatch_plan   count: ids of each block's span, [blocks, M]; scan: over the blocks, expert by
//                   expert; scatter: each warp counts its part of the span, then gives every slot
//                   its row, in slot order. Lanes with one expert are ranked by __match_any_sync.
//   permute         sorted row <- its token's row; a warp per row
//   unpermute       token <- weighted sum of its sorted rows in slot order; a warp per token
//   unpermute_bwd   both gradients of unpermute, a warp per token; also zeroes rows without a slot
//
// Barriers: count 2, scan 1, scatter 4, none among slots; the row movers have none. Shared memory:
// count 4 M bytes, scan 4 KiB, scatter 36 M bytes (first rows, and each of 8 warps' next rows).
// Occupancy: blocks of 256 threads; whole multiprocessors for plan and permute (32 to 40
// registers), 3 or 4 blocks for unpermute and its backward, whose loads in flight take 54 to 80.
// Traffic: a plan reads its 4-byte ids twice and writes 8 bytes per slot; permute reads T and
// writes N rows; unpermute reads N and writes T; unpermute_bwd reads T + N and writes N.
#include <algorithm>

#include "cuda/device/kernel.cuh"
#include "cuda/device/vec.cuh"
#include "cuda/device/warp.cuh"
#include "unipool/dispatch.h"

namespace unipool {
namespace {

constexpr int kWarps = 8;
constexpr int kThreads = kWarps * kWarp;
constexpr int kMinSpan = 2 * kThreads;  // slots of a block
constexpr int kMaxBlocks = 4 * 132;     // then spans grow
constexpr int kScanRows = 32;           // groups of blocks that scan_kernel takes at once
constexpr int kColumns = 4;             // words that a lane moves at once

// --- kernels: dispatch_plan

// The slots of all layers as one sequence.
struct Segments {
  const int32_t* ids[kPlanSegmentLimit];
  int32_t start[kPlanSegmentLimit + 1];  // first slot of each segment; then N
  int count;
};

// Reads ids of growing slots.
class Cursor {
 public:
  __device__ __forceinline__ explicit Cursor(const Segments& s) : s_(s) {}
  // The expert of a slot; -1 if it has none or the slot is past `end`.
  __device__ __forceinline__ int expert(int64_t slot, int64_t end, int experts) {
    if (slot >= end) return -1;
    while (slot >= s_.start[at_ + 1]) ++at_;
    const int id = __ldg(s_.ids[at_] + (slot - s_.start[at_]));
    return unsigned(id) < unsigned(experts) ? id : -1;
  }

 private:
  const Segments& s_;
  int at_ = 0;
};

// Lanes of the warp with the same expert as this one.
struct Peers {
  int rank;  // of this lane among them
  int count;
  int first;  // lane of rank 0

  __device__ __forceinline__ Peers(int expert, int lane) {
    const unsigned same = __match_any_sync(kFullMask, expert);
    rank = __popc(same & ((1u << lane) - 1));
    count = __popc(same);
    first = __ffs(same) - 1;
  }
};

// Block b counts the experts of slots [b * span, (b + 1) * span). Reads 4 bytes per slot.
// counts [blocks, M]. Shared memory: [M] i32.
__global__ __launch_bounds__(kThreads) void count_kernel(const __grid_constant__ Segments segments,
                                                         int64_t slots, int64_t span, int experts,
                                                         int32_t* counts) {
  int32_t* count = dynamic_shared<int32_t>();
  for (int e = threadIdx.x; e < experts; e += kThreads) count[e] = 0;
  __syncthreads();
  const int64_t begin = blockIdx.x * span, end = min(begin + span, slots);
  Cursor cursor(segments);
  for (int64_t first = begin; first < end; first += kThreads) {
    const int expert = cursor.expert(first + threadIdx.x, end, experts);
    const Peers peers(expert, threadIdx.x % kWarp);
    if (expert >= 0 && peers.rank == 0) atomicAdd(&count[expert], peers.count);
  }
  __syncthreads();
  int32_t* out = counts + int64_t(blockIdx.x) * experts;
  for (int e = threadIdx.x; e < experts; e += kThreads) out[e] = count[e];
}

// counts[b][e] becomes the sum over the blocks before b; totals[e] the sum over all. Block
// (32 experts, kScanRows groups of blocks).
__global__ __launch_bounds__(kWarp* kScanRows) void scan_kernel(int32_t* counts, int blocks,
                                                                int experts, int32_t* totals) {
  __shared__ int32_t sums[kScanRows * kWarp];
  const int e = blockIdx.x * kWarp + threadIdx.x;
  const int each = ceil_div(blocks, kScanRows);
  const int begin = threadIdx.y * each, end = min(begin + each, blocks);
  int sum = 0;
  if (e < experts) {
    for (int b = begin; b < end; ++b) sum += counts[int64_t(b) * experts + e];
  }
  sums[threadIdx.y * kWarp + threadIdx.x] = sum;
  __syncthreads();
  if (e >= experts) return;
  int run = 0;
  for (int g = 0; g < int(threadIdx.y); ++g) run += sums[g * kWarp + threadIdx.x];
  for (int b = begin; b < end; ++b) {
    const int64_t at = int64_t(b) * experts + e;
    const int here = counts[at];
    counts[at] = run;
    run += here;
  }
  if (threadIdx.y == kScanRows - 1) totals[e] = run;
}

// first[e] = sum of totals below e, for all e <= M. warp_sums: [kWarps] shared.
__device__ __forceinline__ void scan_experts(const int32_t* totals, int experts, int32_t* first,
                                             int32_t* warp_sums) {
  constexpr int kEach = kExpertLimit / kThreads;
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  int total[kEach], sum = 0;
#pragma unroll
  for (int i = 0; i < kEach; ++i) {
    const int e = threadIdx.x * kEach + i;
    total[i] = e < experts ? totals[e] : 0;
    sum += total[i];
  }
  int warp_total;
  int run = exclusive_scan(sum, lane, warp_total);
  if (lane == 0) warp_sums[warp] = warp_total;
  __syncthreads();
  for (int w = 0; w < warp; ++w) run += warp_sums[w];
#pragma unroll
  for (int i = 0; i < kEach; ++i) {
    const int e = threadIdx.x * kEach + i;
    if (e < experts) first[e] = run;
    run += total[i];
    if (e == experts - 1) first[experts] = run;
  }
}

struct PlanOut {
  int32_t* order;    // [N]
  int32_t* inverse;  // [N]
  int32_t* offsets;  // [M + 1]
};

// Calls f(slot, expert, peers) for the slots of [begin, end), a warp's width at a time and in
// order; expert is -1 for slots without one or past the end.
template <class F>
__device__ __forceinline__ void for_each_slot(const Segments& segments, int64_t begin, int64_t end,
                                              int experts, const F& f) {
  const int lane = threadIdx.x % kWarp;
  Cursor cursor(segments);
  for (int64_t first = begin; first < end; first += kWarp) {
    const int expert = cursor.expert(first + lane, end, experts);
    f(first + lane, expert, Peers(expert, lane));
    __syncwarp();  // another lane may lead the same expert next time
  }
}

// next[w][e]: warp w's slots of expert e; becomes the row of the first of them, where the block's
// are those from first[e] + before[e] on.
__device__ __forceinline__ void counts_to_rows(int32_t* next, const int32_t* first,
                                               const int32_t* before, int experts) {
  for (int e = threadIdx.x; e < experts; e += kThreads) {
    int run = first[e] + before[e];
    for (int w = 0; w < kWarps; ++w) {
      const int here = next[w * experts + e];
      next[w * experts + e] = run;
      run += here;
    }
  }
}

// The slots of [begin, end) to their rows; mine[e] is the row of the warp's next slot of expert e.
__device__ __forceinline__ void place_slots(const Segments& segments, int64_t begin, int64_t end,
                                            int experts, int32_t* mine, const PlanOut& out) {
  for_each_slot(segments, begin, end, experts, [&](int64_t slot, int expert, const Peers& peers) {
    int row = 0;
    if (expert >= 0 && peers.rank == 0) {
      row = mine[expert];
      mine[expert] = row + peers.count;
    }
    row = __shfl_sync(kFullMask, row, peers.first) + peers.rank;
    if (slot < end) out.inverse[slot] = expert >= 0 ? row : -1;
    if (expert >= 0) out.order[row] = int32_t(slot);
  });
}

// Slot order within an expert: blocks in order (counts), then warps, then a warp's slots 32 at a
// time, then lanes. Reads 8 bytes per slot (4 of them from cache), writes 8.
// Shared memory: first [M + 1] i32, then next [kWarps, M] i32.
__global__ __launch_bounds__(kThreads) void scatter_kernel(
    const __grid_constant__ Segments segments, int64_t slots, int64_t span, int experts,
    const int32_t* counts, const int32_t* totals, const PlanOut out) {
  __shared__ int32_t warp_sums[kWarps];
  int32_t* first = dynamic_shared<int32_t>();
  int32_t* next = first + experts + 1;
  const int warp = threadIdx.x / kWarp;
  int32_t* mine = next + warp * experts;
  for (int i = threadIdx.x; i < kWarps * experts; i += kThreads) next[i] = 0;
  scan_experts(totals, experts, first, warp_sums);
  __syncthreads();

  const int64_t begin = blockIdx.x * span + warp * (span / kWarps);
  const int64_t end = min(begin + span / kWarps, min((blockIdx.x + 1) * span, slots));
  for_each_slot(segments, begin, end, experts, [&](int64_t, int expert, const Peers& peers) {
    if (expert >= 0 && peers.rank == 0) mine[expert] += peers.count;
  });
  __syncthreads();
  counts_to_rows(next, first, counts + int64_t(blockIdx.x) * experts, experts);
  __syncthreads();
  place_slots(segments, begin, end, experts, mine, out);

  const int64_t thread = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  const int64_t threads = int64_t(gridDim.x) * kThreads;
  for (int64_t row = first[experts] + thread; row < slots; row += threads) out.order[row] = -1;
  for (int64_t e = thread; e <= experts; e += threads) out.offsets[e] = first[e];
}

// --- kernels: permute

// y[r] = x[order[r] / top_k], zero if order[r] is not in [0, rows). One warp per row of `words`
// words. Reads and writes N * D elements; a token's row is read from DRAM once if its copies are
// near.
template <class W>
__global__ __launch_bounds__(kThreads) void permute_kernel(const W* __restrict__ x,
                                                           const int32_t* __restrict__ order,
                                                           W* __restrict__ y, int64_t rows,
                                                           int64_t words, int top_k) {
  const int64_t row = int64_t(blockIdx.x) * kWarps + threadIdx.x / kWarp;
  if (row >= rows) return;
  const int slot = __ldg(order + row);
  const bool used = unsigned(slot) < rows;
  const W* from = x + int64_t(used ? slot / top_k : 0) * words;
  W* to = y + row * words;
  for (int64_t base = threadIdx.x % kWarp; base < words; base += kWarp * kColumns) {
    W v[kColumns];
#pragma unroll
    for (int c = 0; c < kColumns; ++c) {
      const int64_t at = base + c * kWarp;
      v[c] = used && at < words ? __ldg(from + at) : W{};
    }
#pragma unroll
    for (int c = 0; c < kColumns; ++c) {
      if (base + c * kWarp < words) __stwb(to + base + c * kWarp, v[c]);
    }
  }
}

// --- kernels: unpermute, forward and backward

// out[t] = sum_j weights[t, j] * y[inverse[t, j]]. One warp per token. Reads N * D elements and
// writes T * D.
template <class T, int kVec>
__global__ __launch_bounds__(kThreads) void unpermute_kernel(const UnpermuteArgs args) {
  using V = Vec<T, kVec>;
  const int64_t token = int64_t(blockIdx.x) * kWarps + threadIdx.x / kWarp;
  if (token >= args.tokens) return;
  const int64_t rows = args.tokens * args.top_k, first_slot = token * args.top_k;
  const int64_t vecs = args.width / kVec;
  const T* y = static_cast<const T*>(args.y);
  T* out = static_cast<T*>(args.out) + token * args.width;
  for (int64_t base = threadIdx.x % kWarp; base < vecs; base += kWarp * kColumns) {
    float sum[kColumns][kVec] = {};
#pragma unroll 2
    for (int j = 0; j < args.top_k; ++j) {
      const int row = __ldg(args.inverse + first_slot + j);
      const bool used = unsigned(row) < rows;
      const float given = args.weights == nullptr ? 1.f : __ldg(args.weights + first_slot + j);
      const float weight = used ? given : 0.f;
      const T* from = y + (used ? row : 0) * args.width;
#pragma unroll
      for (int c = 0; c < kColumns; ++c) {
        const int64_t at = base + c * kWarp;
        float v[kVec];
        (used && at < vecs ? V::load(from + at * kVec) : V::zero()).unpack(v);
#pragma unroll
        for (int i = 0; i < kVec; ++i) sum[c][i] += weight * v[i];
      }
    }
#pragma unroll
    for (int c = 0; c < kColumns; ++c) {
      const int64_t at = base + c * kWarp;
      if (at < vecs) V::pack(sum[c]).store(out + at * kVec);
    }
  }
}

// For every slot: grad_y[row] = weight * grad[token] and grad_weights = <grad[token], y[row]>.
// One warp per token. Reads (T + N) * D elements (a token's further reads of grad are from cache)
// and writes N * D.
template <class T, int kVec>
__global__ __launch_bounds__(kThreads, 3) void unpermute_bwd_kernel(const UnpermuteBwdArgs args) {
  using V = Vec<T, kVec>;
  const int64_t token = int64_t(blockIdx.x) * kWarps + threadIdx.x / kWarp;
  if (token >= args.tokens) return;
  const int lane = threadIdx.x % kWarp;
  const int64_t rows = args.tokens * args.top_k, vecs = args.width / kVec;
  const T* grad = static_cast<const T*>(args.grad) + token * args.width;
  T* grad_y = static_cast<T*>(args.grad_y);
  for (int64_t slot = token * args.top_k; slot < (token + 1) * args.top_k; ++slot) {
    const int row = __ldg(args.inverse + slot);
    float dot = 0.f;
    if (unsigned(row) < rows) {  // the same in the whole warp
      const float weight = __ldg(args.weights + slot);
      const T* y = static_cast<const T*>(args.y) + row * args.width;
      T* out = grad_y + row * args.width;
#pragma unroll kColumns
      for (int64_t at = lane; at < vecs; at += kWarp) {
        float g[kVec], v[kVec];
        V::load(grad + at * kVec).unpack(g);
        V::load(y + at * kVec).unpack(v);
#pragma unroll
        for (int i = 0; i < kVec; ++i) {
          dot += g[i] * v[i];
          g[i] *= weight;
        }
        V::pack(g).store(out + at * kVec);
      }
    }
    dot = group_sum(dot);
    if (lane == 0) args.grad_weights[slot] = dot;
    // There are as many rows as slots: this warp also sees to the rows with its slots' numbers.
    if (unsigned(__ldg(args.order + slot)) >= rows) {
      for (int64_t at = lane; at < vecs; at += kWarp) {
        V::zero().store(grad_y + slot * args.width + at * kVec);
      }
    }
  }
}

// --- launchers

int plan_blocks(int64_t slots) {
  return int(std::clamp<int64_t>(ceil_div(slots, int64_t(kMinSpan)), 1, kMaxBlocks));
}

template <class W>
cudaError_t launch_permute_words(const PermuteArgs& args, cudaStream_t stream) {
  return launch(permute_kernel<W>, dim3(unsigned(ceil_div(args.rows, int64_t(kWarps)))),
                dim3(kThreads), 0, stream, static_cast<const W*>(args.x), args.order,
                static_cast<W*>(args.y), args.rows, args.row_bytes / int64_t(sizeof(W)),
                args.top_k);
}

// One warp per token; `vector` wants aligned rows.
template <class Args>
cudaError_t launch_tokens(void (*vector)(Args), void (*scalar)(Args), bool aligned,
                          const Args& args, cudaStream_t stream) {
  const dim3 grid(unsigned(ceil_div(args.tokens, int64_t(kWarps))));
  return launch(aligned ? vector : scalar, grid, dim3(kThreads), 0, stream, args);
}

}  // namespace

size_t dispatch_plan_workspace_bytes(int64_t slots, int num_experts) {
  return (size_t(plan_blocks(slots)) + 1) * num_experts * sizeof(int32_t);
}

cudaError_t launch_dispatch_plan(const DispatchPlanArgs& args, cudaStream_t stream) {
  const int experts = args.num_experts;
  if (experts < 1 || experts > kExpertLimit || args.segments < 0 ||
      args.segments > kPlanSegmentLimit) {
    return cudaErrorInvalidValue;
  }
  Segments segments{};
  int64_t slots = 0;
  for (int i = 0; i < args.segments; ++i) {
    segments.ids[i] = args.experts[i];
    segments.start[i] = int32_t(slots);
    slots += args.slots[i];
  }
  if (slots > INT32_MAX) return cudaErrorInvalidValue;
  segments.start[args.segments] = int32_t(slots);
  segments.count = args.segments;

  const int blocks = plan_blocks(slots);
  const int64_t span = ceil_div(ceil_div(slots, int64_t(blocks)), int64_t(kThreads)) * kThreads;
  int32_t* counts = static_cast<int32_t*>(args.workspace);
  int32_t* totals = counts + int64_t(blocks) * experts;
  cudaError_t error = launch(count_kernel, dim3(blocks), dim3(kThreads), sizeof(int32_t) * experts,
                             stream, segments, slots, span, experts, counts);
  if (error != cudaSuccess) return error;
  error = launch(scan_kernel, dim3(ceil_div(experts, kWarp)), dim3(kWarp, kScanRows), 0, stream,
                 counts, blocks, experts, totals);
  if (error != cudaSuccess) return error;
  return launch(scatter_kernel, dim3(blocks), dim3(kThreads),
                sizeof(int32_t) * (experts * (1 + kWarps) + 1), stream, segments, slots, span,
                experts, counts, totals, PlanOut{args.order, args.inverse, args.offsets});
}

cudaError_t launch_permute(const PermuteArgs& args, cudaStream_t stream) {
  if (args.rows == 0 || args.row_bytes == 0) return cudaSuccess;
  const auto aligned = [&](int bytes) {
    return is_aligned(args.x, args.row_bytes, bytes) && is_aligned(args.y, args.row_bytes, bytes);
  };
  if (aligned(16)) return launch_permute_words<uint4>(args, stream);
  if (aligned(4)) return launch_permute_words<uint32_t>(args, stream);
  return aligned(2) ? launch_permute_words<uint16_t>(args, stream) : cudaErrorInvalidValue;
}

cudaError_t launch_unpermute(const UnpermuteArgs& args, cudaStream_t stream) {
  if (args.tokens == 0 || args.width == 0) return cudaSuccess;
  const int64_t row_bytes = args.width * int64_t(size_of(args.dtype));
  const bool aligned = is_aligned(args.y, row_bytes) && is_aligned(args.out, row_bytes);
  switch (args.dtype) {
    case DType::kFloat32:
      return launch_tokens(unpermute_kernel<float, 4>, unpermute_kernel<float, 1>, aligned, args,
                           stream);
    case DType::kFloat16:
      return launch_tokens(unpermute_kernel<__half, 8>, unpermute_kernel<__half, 1>, aligned, args,
                           stream);
    case DType::kBFloat16:
      return launch_tokens(unpermute_kernel<__nv_bfloat16, 8>, unpermute_kernel<__nv_bfloat16, 1>,
                           aligned, args, stream);
  }
  return cudaErrorInvalidValue;
}

cudaError_t launch_unpermute_bwd(const UnpermuteBwdArgs& args, cudaStream_t stream) {
  if (args.tokens == 0) return cudaSuccess;
  const int64_t row_bytes = args.width * int64_t(size_of(args.dtype));
  const bool aligned = is_aligned(args.grad, row_bytes) && is_aligned(args.y, row_bytes) &&
                       is_aligned(args.grad_y, row_bytes);
  switch (args.dtype) {
    case DType::kFloat32:
      return launch_tokens(unpermute_bwd_kernel<float, 4>, unpermute_bwd_kernel<float, 1>, aligned,
                           args, stream);
    case DType::kFloat16:
      return launch_tokens(unpermute_bwd_kernel<__half, 8>, unpermute_bwd_kernel<__half, 1>,
                           aligned, args, stream);
    case DType::kBFloat16:
      return launch_tokens(unpermute_bwd_kernel<__nv_bfloat16, 8>,
                           unpermute_bwd_kernel<__nv_bfloat16, 1>, aligned, args, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace unipool
