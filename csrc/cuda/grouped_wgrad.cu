// SPDX-License-Identifier: Apache-2.0
// The weight gradient of a pool: out[e] = sum over the rows of e, in all segments (layers), of
// grad^T input. Each expert is one product whose K runs over these rows, wherever they are: a table
// of row addresses, built first, serves as the index of K.
//
//   merge_offsets   one block, one thread per expert: where the rows of each expert and segment go
//   fill_rows       one thread per row: finds its expert by bisection, writes the row's two
//   addresses wgrad           one block per tile of out[e]: the pipeline of gemm/mainloop.cuh along
//   the table,
//                   both operands transposed on their way out of shared memory (ldmatrix.trans)
//
// Barriers: one per k tile, three for the stored tile. Shared memory: the pipeline, 64 or 72 KiB,
// in which the tile is staged (68 KiB for float32 of t128). Occupancy: 2 blocks of 128 threads per
// multiprocessor. Traffic: 16 bytes per row for the table, written and read; each row of both
// operands from DRAM once where an expert's rows stay in L2 while its tiles need them; out written
// once, or read and written where it is added to. Sums are float32, rounded once.
#include "cuda/device/gemm/epilogue.cuh"
#include "cuda/device/gemm/launch.cuh"
#include "cuda/device/gemm/loaders.cuh"
#include "cuda/device/gemm/mainloop.cuh"
#include "cuda/device/gemm/slots.cuh"
#include "cuda/device/warp.cuh"
#include "unipool/grouped_wgrad.h"

namespace unipool {
namespace {

constexpr int kFillThreads = 256;

// --- the plan: merged rows, expert by expert and within one segment by segment

struct RowAddresses {
  const void* grad;
  const void* input;
};

// In the workspace. starts[s][e]: rows of e in the segments before s; kNoRows in segments whose
// offsets descend somewhere, which have none: the table is then full whatever they say.
struct MergedPlan {
  uint4* zeros;  // a row of zeros: both operands of a row whose slot is none of its segment's
  int zero_chunks;
  int total;           // rows of all segments
  RowAddresses* rows;  // [total]
  int32_t* offsets;    // [M + 1], all <= total
  int32_t* starts;     // [segments, M]

  static int chunks(int64_t row_bytes) { return int(ceil_div(row_bytes, int64_t(kVectorBytes))); }
  static size_t bytes(int64_t total_rows, int experts, int64_t row_bytes) {
    return sizeof(uint4) * chunks(row_bytes) + sizeof(RowAddresses) * total_rows +
           sizeof(int32_t) * (size_t(experts) * (1 + kWgradSegmentLimit) + 1);
  }
  MergedPlan(void* workspace, int64_t total_rows, int experts, int64_t row_bytes)
      : zeros(static_cast<uint4*>(workspace)),
        zero_chunks(chunks(row_bytes)),
        total(int(total_rows)),
        rows(reinterpret_cast<RowAddresses*>(zeros + zero_chunks)),
        offsets(reinterpret_cast<int32_t*>(rows + total_rows)),
        starts(offsets + experts + 1) {}
};

constexpr int kNoRows = -1;

// The end of a segment's experts before e, which is at most its number of rows.
__device__ __forceinline__ int bounded_offset(const WgradSegment& segment, int e) {
  return min(max(__ldg(segment.offsets + e), 0), int(segment.rows));
}

// Bit s % 32 of word s / 32: segment s has offsets that descend. One thread per expert; begins and
// ends with a barrier.
__device__ __forceinline__ void find_descending(const GroupedWgradArgs& args, uint32_t* bits) {
  const int e = threadIdx.x;
  if (e < kWgradSegmentLimit / 32) bits[e] = 0;
  __syncthreads();
#pragma unroll 1  // once per launch
  for (int s = 0; s < args.count; ++s) {
    const bool descends = e < args.experts && bounded_offset(args.segments[s], e + 1) <
                                                  bounded_offset(args.segments[s], e);
    if (descends) atomicOr(bits + s / 32, 1u << s % 32);
  }
  __syncthreads();
}

// One block, one thread per expert. Reads the offsets of all segments twice.
__global__ __launch_bounds__(kExpertLimit) void merge_offsets_kernel(
    const __grid_constant__ GroupedWgradArgs args, const MergedPlan plan) {
  __shared__ int32_t warp_sums[kWarp];
  __shared__ uint32_t descending[kWgradSegmentLimit / 32];
  const int e = threadIdx.x, warp = e / kWarp, lane = e % kWarp;
  const bool exists = e < args.experts;
  find_descending(args, descending);
  int count = 0;
#pragma unroll 4
  for (int s = 0; s < args.count; ++s) {
    if (!exists) continue;
    const WgradSegment& segment = args.segments[s];
    const bool counts = (descending[s / 32] >> s % 32 & 1) == 0;
    plan.starts[s * args.experts + e] = counts ? count : kNoRows;
    if (counts) count += bounded_offset(segment, e + 1) - bounded_offset(segment, e);
  }
  int warp_total;
  int first = exclusive_scan(count, lane, warp_total);
  if (lane == 0) warp_sums[warp] = warp_total;
  __syncthreads();
  for (int w = 0; w < warp; ++w) first += warp_sums[w];
  if (exists) plan.offsets[e] = min(first, plan.total);
  if (e == args.experts - 1) plan.offsets[args.experts] = min(first + count, plan.total);
  for (int i = e; i < plan.zero_chunks; i += kExpertLimit) plan.zeros[i] = uint4{};
}

// One thread per row of segment blockIdx.y: finds its expert, and from it the row's place. Reads at
// most 4 bytes per row and the offsets, writes 16 bytes.
__global__ __launch_bounds__(kFillThreads) void fill_rows_kernel(
    const __grid_constant__ GroupedWgradArgs args, const MergedPlan plan) {
  const WgradSegment& segment = args.segments[blockIdx.y];
  const int64_t row = int64_t(blockIdx.x) * kFillThreads + threadIdx.x;
  if (row >= bounded_offset(segment, args.experts)) return;
  int expert = 0;
  for (int end = args.experts; end - expert > 1;) {  // offsets[expert] <= row < offsets[end]
    const int middle = (expert + end) / 2;
    (bounded_offset(segment, middle) <= row ? expert : end) = middle;
  }
  const int start = plan.starts[int(blockIdx.y) * args.experts + expert];
  const int64_t among = row - bounded_offset(segment, expert);  // the expert's rows in the segment
  if (start == kNoRows || among < 0) return;
  const int64_t at = int64_t(plan.offsets[expert]) + start + among;
  if (at >= plan.total) return;
  const int slot = segment.order == nullptr ? 0 : checked_index(segment.order, row, segment.rows);
  if (slot < 0) {
    plan.rows[at] = {plan.zeros, plan.zeros};
    return;
  }
  const int64_t grad_row = args.grad_top_k > 0 ? slot / args.grad_top_k : row;
  const int64_t input_row = args.input_top_k > 0 ? slot / args.input_top_k : row;
  const int64_t size = size_of(args.dtype);
  plan.rows[at] = {static_cast<const char*>(segment.grad) + grad_row * args.n * size,
                   static_cast<const char*>(segment.input) + input_row * args.k * size};
}

// --- the product

struct Product {
  const RowAddresses* rows;
  const int32_t* offsets;  // [M + 1]
  void* out;               // [M, n, k]
  int n, k;
  int column_tiles, expert_tiles;  // of a row of tiles; of an expert
  bool add;
};

// One block per tile of out[e], expert by expert, so that an expert's rows are in L2 while its
// tiles need them. Reads each row once per tile across and along (from DRAM once); writes out once,
// or reads and writes it. Shared memory: the pipeline, then the stored tile.
template <class Tile, class Out, bool kVector>
__global__ __launch_bounds__(Tile::kThreads, 2) void wgrad_kernel(const Product p) {
  using T = typename Tile::T;
  using A = typename Tile::A;
  using B = typename Tile::B;
  const int expert = int(blockIdx.x) / p.expert_tiles;
  const int tile = int(blockIdx.x) - expert * p.expert_tiles;
  const int row = tile / p.column_tiles * Tile::kM, column = tile % p.column_tiles * Tile::kN;
  const int begin = __ldg(p.offsets + expert), depth = __ldg(p.offsets + expert + 1) - begin;
  if (depth == 0 && p.add) return;

  auto* shared = dynamic_shared<unsigned char>();
  T* smem = reinterpret_cast<T*>(shared);
  const auto* table = reinterpret_cast<const T* const*>(p.rows + begin);  // grad, input, grad, ...
  using LinesA = TableLines<A, kVector>;
  using LinesB = TableLines<B, kVector>;
  Loader<A, LinesA, kVector> load_a(smem, LinesA(table, 2, depth, row), depth, p.n - row);
  Loader<B, LinesB, kVector> load_b(smem + Tile::kElementsA, LinesB(table + 1, 2, depth, column),
                                    depth, p.k - column);
  auto acc = Tile::zeros();
  multiply<Tile>(smem, load_a, load_b, ceil_div(depth, Tile::kK), acc);
  Out* out = static_cast<Out*>(p.out) + (int64_t(expert) * p.n + row) * p.k + column;
  store_tile<Tile, kVector>(
      reinterpret_cast<Out*>(shared), acc, p.n - row, p.k - column,
      [&](int r) { return out + int64_t(r) * p.k; }, p.add);
}

template <class Tile, class Out, bool kVector>
cudaError_t launch_instance(const GroupedWgradArgs& args, const MergedPlan& plan,
                            cudaStream_t stream) {
  const int64_t column_tiles = ceil_div(args.k, int64_t(Tile::kN));
  const int64_t expert_tiles = column_tiles * ceil_div(args.n, int64_t(Tile::kM));
  if (expert_tiles == 0) return cudaSuccess;
  if (expert_tiles * args.experts > INT32_MAX) return cudaErrorInvalidValue;
  const Product product{plan.rows,   plan.offsets,      args.out,          int(args.n),
                        int(args.k), int(column_tiles), int(expert_tiles), args.add};
  constexpr auto kKernel = wgrad_kernel<Tile, Out, kVector>;
  int resident;
  const cudaError_t error =
      resident_blocks<kKernel>(Tile::kThreads, kTileBytes<Tile, Out>, &resident);
  if (error != cudaSuccess) return error;
  return launch(kKernel, dim3(unsigned(expert_tiles * args.experts)), dim3(Tile::kThreads),
                kTileBytes<Tile, Out>, stream, product);
}

// --- launchers

cudaError_t launch_plan(const GroupedWgradArgs& args, const MergedPlan& plan, cudaStream_t stream) {
  int64_t longest = 0;
  for (int s = 0; s < args.count; ++s) longest = std::max(longest, args.segments[s].rows);
  const cudaError_t error =
      launch(merge_offsets_kernel, dim3(1), dim3(kExpertLimit), 0, stream, args, plan);
  if (error != cudaSuccess || longest == 0) return error;
  const dim3 grid(unsigned(ceil_div(longest, int64_t(kFillThreads))), unsigned(args.count));
  return launch(fill_rows_kernel, grid, dim3(kFillThreads), 0, stream, args, plan);
}

bool is_vector(const GroupedWgradArgs& args) {
  const int64_t size = size_of(args.dtype);
  bool vector = is_aligned(args.out, args.k * int64_t(size_of(args.out_dtype)));
  for (int s = 0; s < args.count; ++s) {
    vector = vector && is_aligned(args.segments[s].grad, args.n * size) &&
             is_aligned(args.segments[s].input, args.k * size);
  }
  return vector;
}

}  // namespace

size_t grouped_wgrad_workspace_bytes(int64_t total_rows, int experts, int64_t row_bytes) {
  return MergedPlan::bytes(total_rows, experts, row_bytes);
}

cudaError_t launch_grouped_wgrad(const GroupedWgradArgs& args, cudaStream_t stream) {
  int64_t rows = 0;
  for (int s = 0; s < args.count; ++s) rows += args.segments[s].rows;
  const bool widened = args.out_dtype == DType::kFloat32;
  if (args.experts < 1 || args.experts > kExpertLimit || args.count < 0 ||
      args.count > kWgradSegmentLimit || rows > INT32_MAX || args.n > INT32_MAX ||
      args.k > INT32_MAX || (!widened && (args.out_dtype != args.dtype || args.add))) {
    return cudaErrorInvalidValue;
  }
  const bool vector = is_vector(args);
  const GemmProblem problem{GemmKind::kWgrad,         rows,  args.experts, args.n, args.k,
                            int(size_of(args.dtype)), vector};
  int tile;
  cudaError_t error = gemm_tile(problem, args.tile, &tile);
  if (error != cudaSuccess) return error;
  const int64_t row_bytes = std::max(args.n, args.k) * int64_t(size_of(args.dtype));
  const MergedPlan plan(args.workspace, rows, args.experts, row_bytes);
  error = launch_plan(args, plan, stream);
  if (error != cudaSuccess) return error;
  return for_dtype(args.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    return for_tile<T, GemmKind::kWgrad>(tile, vector, [&](auto index, auto fast) {
      using Chosen = GemmTileOf<T, index, Major::kMn, Major::kMn>;
      return widened ? launch_instance<Chosen, float, fast>(args, plan, stream)
                     : launch_instance<Chosen, T, fast>(args, plan, stream);
    });
  });
}

}  // namespace unipool
