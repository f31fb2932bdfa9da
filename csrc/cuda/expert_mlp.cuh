// SPDX-License-Identifier: Apache-2.0
// What the forward and the backward pass of the expert MLP share: the launch of a product over
// sorted rows, and the product whose rows return to their tokens (the down projection, and the
// gradient of its input).
#pragma once
#include "cuda/device/gemm/epilogue.cuh"
#include "cuda/device/gemm/launch.cuh"
#include "cuda/device/gemm/loaders.cuh"
#include "cuda/device/gemm/mainloop.cuh"
#include "cuda/device/gemm/schedule.cuh"
#include "cuda/device/gemm/slots.cuh"
#include "unipool/expert_mlp.h"

namespace unipool {

// Shared memory of a block: pipeline or staged outputs (of type Out), then the schedule.
template <class Tile, class Out>
struct RowsShared {
  using Staged = OutputTile<Out, Tile::kM, Tile::kN, Tile::kThreads>;
  static constexpr size_t kTileBytes = std::max(Tile::kPipelineBytes, Staged::kBytes);

  __host__ __device__ static constexpr size_t bytes(int experts) {
    return kTileBytes + RowSchedule<Tile>::shared_bytes(experts);
  }
};

// The tile for `args.rows` rows times matrices of `columns` columns.
template <class Args>
cudaError_t rows_tile(const Args& args, GemmKind kind, int64_t columns, int64_t depth, bool vector,
                      int* tile) {
  if (args.experts < 1 || args.experts > kExpertLimit || args.top_k < 1 || args.rows > INT32_MAX ||
      columns > INT32_MAX || depth > INT32_MAX) {
    return cudaErrorInvalidValue;
  }
  const int size = int(size_of(args.dtype));
  return gemm_tile({kind, args.rows, args.experts, columns, depth, size, vector}, args.tile, tile);
}

// Launches Instance<Tile, kVector>::kKernel; kMajorB: kK if matrices are read along their rows.
template <template <class, bool> class Instance, Major kMajorB, class Args>
cudaError_t launch_rows(const Args& args, int tile, int64_t columns, bool vector,
                        cudaStream_t stream) {
  return for_dtype(args.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    return for_tile<T>(tile, vector, [&](auto index, auto fast) {
      using Chosen = GemmTileOf<T, index, Major::kK, kMajorB>;
      using Kernel = Instance<Chosen, fast>;
      static_assert(Kernel::Shared::bytes(kExpertLimit) <=
                        size_t(kGemmTiles[index].shared_bytes()) + kGemmScheduleBytes,
                    "gemm_tile_fits() takes this for the most");
      return launch_persistent<Kernel::kKernel>(
          Chosen::kThreads, Kernel::Shared::bytes(args.experts),
          RowSchedule<Chosen>::max_tiles(args.rows, args.experts, columns), stream, args);
    });
  });
}

// f(row, v) of the accumulators v, in shared memory for all threads to read.
template <class Tile, class Staged, class Acc, class F>
__device__ __forceinline__ void stage_tile(const Staged& staged, Acc& acc, const F& f) {
  __syncthreads();
  for_each_pair<Tile>(acc, [&](int row, int column, const float* v) {
    float value[Tile::kPair];
#pragma unroll
    for (int i = 0; i < Tile::kPair; ++i) value[i] = f(row, v[i]);
    staged.template put<Tile::kPair>(row, column, value);
  });
  __syncthreads();
}

// --- rows that return to tokens

// out = weight * in[r] matrix[e], [D] columns, to row order[r] if top_k is 1, else to row r
struct ToTokensArgs {
  const void* in;          // [N, depth]
  const void* matrix;      // [M, D, depth], or [M, depth, D] where it is read across
  const float* weights;    // [T, k]; null where the matrix is read across: ones
  const int32_t* order;    // [N]
  const int32_t* inverse;  // [T, k]
  const int32_t* offsets;  // [M + 1]
  void* out;               // [N, D]
  int64_t rows, depth, columns;
  int experts, top_k;
  DType dtype;
  int tile;
};

// Reads each expert's matrix from DRAM once, if it has rows, and the rows once per column of tiles
// (mostly from L2); writes every row of `out`. Registers of the slow path are left to the compiler
// (0), which would unroll into spills if it were told that one block may have them all.
template <class Tile, bool kVector>
__global__ __launch_bounds__(Tile::kThreads, kVector ? Tile::kBlocks : 0) void to_tokens_kernel(
    const __grid_constant__ ToTokensArgs args) {
  using T = typename Tile::T;
  using Shared = RowsShared<Tile, T>;
  using LinesA = StridedLines<typename Tile::A>;
  using LinesB = StridedLines<typename Tile::B>;
  constexpr bool kAlong = Tile::B::kMajor == Major::kK;
  __shared__ int32_t slots[Tile::kM];
  __shared__ float factors[Tile::kM];
  auto* shared = dynamic_shared<unsigned char>();
  T* smem = reinterpret_cast<T*>(shared);
  T* out = static_cast<T*>(args.out);
  const int depth = int(args.depth), width = int(args.columns);

  if (args.top_k == 1) zero_dropped_tokens<kVector>(args.inverse, out, args.rows, width);
  RowSchedule<Tile> schedule(reinterpret_cast<int32_t*>(shared + Shared::kTileBytes), args.offsets,
                             args.experts, args.rows, width);
  RowTile tile;
  while (schedule.next(tile)) {
    find_slots<Tile>(slots, tile, args.order, args.rows, args.experts);
    if (const int r = threadIdx.x; kAlong && r < Tile::kM) {  // its own slot
      factors[r] = slots[r] < 0 ? 0.f : __ldg(args.weights + slots[r]);
    }
    const int columns = width - tile.column;
    const T* rows = static_cast<const T*>(args.in) + int64_t(tile.row) * depth;
    const T* matrix = static_cast<const T*>(args.matrix) + int64_t(tile.expert) * width * depth +
                      int64_t(tile.column) * (kAlong ? depth : 1);
    Loader<typename Tile::A, LinesA, kVector> load_a(smem, LinesA::matrix(rows, depth), tile.rows,
                                                     depth);
    Loader<typename Tile::B, LinesB, kVector> load_b(
        smem + Tile::kElementsA, LinesB::matrix(matrix, kAlong ? depth : width),
        kAlong ? columns : depth, kAlong ? depth : columns);
    auto acc = Tile::zeros();
    const bool tail = tile.expert == args.experts;
    multiply<Tile>(smem, load_a, load_b, tail ? 0 : ceil_div(depth, Tile::kK), acc);

    const typename Shared::Staged staged{smem};
    stage_tile<Tile>(staged, acc, [&](int row, float v) { return kAlong ? factors[row] * v : v; });
    staged.for_each_chunk(tile.rows, columns, [&](int row, int column, const T* from) {
      const int to = args.top_k == 1 ? slots[row] : tile.row + row;
      if (to < 0) return;
      store_chunk<kVector>(shared_chunk(from), out + int64_t(to) * width + tile.column + column,
                           columns - column);
    });
    __syncthreads();
  }
}

template <class Tile, bool kVector>
struct ToTokens {
  using Shared = RowsShared<Tile, typename Tile::T>;
  static constexpr auto kKernel = to_tokens_kernel<Tile, kVector>;
};

template <Major kMajorB>
cudaError_t launch_to_tokens(const ToTokensArgs& args, cudaStream_t stream) {
  constexpr bool kAlong = kMajorB == Major::kK;
  const int64_t size = size_of(args.dtype);
  const bool vector = is_aligned(args.in, args.depth * size) &&
                      is_aligned(args.matrix, (kAlong ? args.depth : args.columns) * size) &&
                      is_aligned(args.out, args.columns * size);
  int tile;
  const cudaError_t error = rows_tile(args, kAlong ? GemmKind::kRows : GemmKind::kRowsBwd,
                                      args.columns, args.depth, vector, &tile);
  if (error != cudaSuccess) return error;
  return launch_rows<ToTokens, kMajorB>(args, tile, args.columns, vector, stream);
}

}  // namespace unipool
