// SPDX-License-Identifier: Apache-2.0
// Rows times the matrix of their expert, and the gradient of the rows: one kernel, compiled for the
// two directions in units of their own (each takes gigabytes to compile).
//
// A persistent block finds its tiles from the offsets (gemm/schedule.cuh), runs the pipeline over K
// for each (gemm/mainloop.cuh) and stores it through shared memory (gemm/epilogue.cuh): the
// plainest product made of these parts.
//
// Barriers: one per k tile, three per stored tile, two per block for the schedule. Shared memory:
// the pipeline, 64 to 80 KiB (24 for float32), in which the tile is staged, and 4 (M + 6) bytes of
// schedule. Occupancy: 2 or 3 blocks of 128 threads per multiprocessor. Traffic: N (K + n) elements
// of rows and n K of each expert's matrix, if it has rows, from DRAM once; a row tile again from L2
// for each column of tiles.
#pragma once
#include "cuda/device/gemm/epilogue.cuh"
#include "cuda/device/gemm/launch.cuh"
#include "cuda/device/gemm/loaders.cuh"
#include "cuda/device/gemm/mainloop.cuh"
#include "cuda/device/gemm/schedule.cuh"
#include "unipool/grouped_mm.h"

namespace unipool {

// out[r] = a[r] b[e]^T if the tile takes B K-major, a[r] b[e] if not: the matrix is the same, read
// along its rows or across them.
template <class Tile>
struct Sizes {
  static constexpr bool kForward = Tile::B::kMajor == Major::kK;
  int columns, depth;
  __host__ __device__ explicit Sizes(const GroupedMmArgs& args)
      : columns(int(kForward ? args.n : args.k)), depth(int(kForward ? args.k : args.n)) {}
};

// Resident blocks that registers are saved for; under any bound ptxas batches the loads of the slow
// path of 16-bit elements, and spills.
template <class Tile, bool kVector>
constexpr int kResident = kVector                         ? Tile::kBlocks
                          : sizeof(typename Tile::T) == 4 ? 2
                                                          : 0;

// Reads each expert's matrix from DRAM once, if it has rows, and the rows once per column of tiles
// (mostly from L2); writes every row of `out`. Shared memory: the pipeline, then the schedule.
template <class Tile, bool kVector>
__global__ __launch_bounds__(Tile::kThreads, (kResident<Tile, kVector>)) void grouped_mm_kernel(
    const __grid_constant__ GroupedMmArgs args) {
  using T = typename Tile::T;
  using LinesA = StridedLines<typename Tile::A>;
  using LinesB = StridedLines<typename Tile::B>;
  auto* shared = dynamic_shared<unsigned char>();
  T* smem = reinterpret_cast<T*>(shared);
  const Sizes<Tile> sizes(args);
  const int depth = sizes.depth;

  RowSchedule<Tile> schedule(reinterpret_cast<int32_t*>(shared + kTileBytes<Tile>), args.offsets,
                             args.experts, args.rows, sizes.columns);
  RowTile tile;
  while (schedule.next(tile)) {
    const int columns = sizes.columns - tile.column;
    const T* rows = static_cast<const T*>(args.a) + int64_t(tile.row) * depth;
    const T* matrix = static_cast<const T*>(args.b) + tile.expert * args.n * args.k +
                      (sizes.kForward ? tile.column * args.k : tile.column);
    Loader<typename Tile::A, LinesA, kVector> load_a(smem, LinesA::matrix(rows, depth), tile.rows,
                                                     depth);
    Loader<typename Tile::B, LinesB, kVector> load_b(
        smem + Tile::kElementsA, LinesB::matrix(matrix, args.k), sizes.kForward ? columns : depth,
        sizes.kForward ? depth : columns);
    auto acc = Tile::zeros();
    const bool tail = tile.expert == args.experts;
    multiply<Tile>(smem, load_a, load_b, tail ? 0 : ceil_div(depth, Tile::kK), acc);
    T* out = static_cast<T*>(args.out) + int64_t(tile.row) * sizes.columns + tile.column;
    store_tile<Tile, kVector>(smem, acc, tile.rows, columns,
                              [&](int row) { return out + int64_t(row) * sizes.columns; });
  }
}

template <class Tile, bool kVector>
cudaError_t launch_instance(const GroupedMmArgs& args, cudaStream_t stream) {
  return launch_persistent<grouped_mm_kernel<Tile, kVector>>(
      Tile::kThreads, kTileBytes<Tile> + RowSchedule<Tile>::shared_bytes(args.experts),
      RowSchedule<Tile>::max_tiles(args.rows, args.experts, Sizes<Tile>(args).columns), stream,
      args);
}

template <Major kMajorB>
cudaError_t launch_product(const GroupedMmArgs& args, cudaStream_t stream) {
  constexpr bool kForward = kMajorB == Major::kK;
  if (args.experts < 1 || args.experts > kExpertLimit || args.rows > INT32_MAX ||
      args.n > INT32_MAX || args.k > INT32_MAX) {
    return cudaErrorInvalidValue;
  }
  const int64_t size = size_of(args.dtype);
  const bool vector = is_aligned(args.a, (kForward ? args.k : args.n) * size) &&
                      is_aligned(args.b, args.k * size) &&
                      is_aligned(args.out, (kForward ? args.n : args.k) * size);
  const GemmProblem problem{kForward ? GemmKind::kRows : GemmKind::kRowsBwd,
                            args.rows,
                            args.experts,
                            kForward ? args.n : args.k,
                            kForward ? args.k : args.n,
                            int(size),
                            vector};
  int tile;
  const cudaError_t error = gemm_tile(problem, args.tile, &tile);
  if (error != cudaSuccess) return error;
  return for_dtype(args.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    return for_tile<T>(tile, vector, [&](auto index, auto fast) {
      using Chosen = GemmTileOf<T, index, Major::kK, kMajorB>;
      return launch_instance<Chosen, fast>(args, stream);
    });
  });
}

}  // namespace unipool
