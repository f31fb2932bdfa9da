// SPDX-License-Identifier: Apache-2.0
// Which tiles of the rows of all experts a block computes, found on the device: the host knows
// their number only. Blocks walk over all tiles, blockIdx.x, + gridDim.x, ..., expert by expert and
// within one columns by columns, so that a tile of weights leaves DRAM once and the row tiles that
// share it run side by side. Experts without rows have no tile. Rows past offsets[M] are one more
// group, with expert == experts: zeros are to be stored there. Whatever offsets say, tiles are of
// rows that exist.
#pragma once
#include <algorithm>

#include "cuda/device/warp.cuh"

namespace unipool {

struct RowTile {
  int expert;
  int row, rows;  // sorted rows [row, row + rows); rows <= kM
  int column;     // first column
};

template <class Tile>
class RowSchedule {
  static constexpr int kWarps = Tile::kThreads / kWarp;

 public:
  // Of shared memory: a number per warp, and for each group its first row tile.
  __host__ __device__ static constexpr size_t shared_bytes(int experts) {
    return sizeof(int32_t) * (kWarps + size_t(experts) + 2);
  }
  // At most, for a grid that is not larger than its work.
  static int64_t max_tiles(int64_t rows, int experts, int64_t columns) {
    return (rows / Tile::kM + std::min(int64_t(experts) + 1, rows)) *
           ceil_div(columns, int64_t(Tile::kN));
  }

  // shared: shared_bytes(experts). All threads; ends with a barrier.
  __device__ __forceinline__ RowSchedule(int32_t* shared, const int32_t* offsets, int experts,
                                         int64_t rows, int64_t columns)
      : first_(shared + kWarps),
        offsets_(offsets),
        experts_(experts),
        rows_(int(rows)),
        column_tiles_(int(ceil_div(columns, int64_t(Tile::kN)))),
        tile_(blockIdx.x) {
    scan(shared);
  }

  // The block's next tile; false if there is none. All threads get the same.
  __device__ __forceinline__ bool next(RowTile& tile) {
    const int row_tile = int(tile_ / column_tiles_);  // counted as if an expert had one column
    if (row_tile >= first_[experts_ + 1]) return false;
    int group = 0;
    for (int end = experts_ + 1; end - group > 1;) {  // first_[group] <= row_tile < first_[end]
      const int middle = (group + end) / 2;
      (first_[middle] <= row_tile ? group : end) = middle;
    }
    const int row_tiles = first_[group + 1] - first_[group];
    const int64_t index = tile_ - int64_t(first_[group]) * column_tiles_;
    const int column = int(index / row_tiles);
    tile.expert = group;
    tile.row = offset(group) + (int(index) - column * row_tiles) * Tile::kM;
    tile.rows = min(end_of(group) - tile.row, Tile::kM);
    tile.column = column * Tile::kN;
    tile_ += gridDim.x;
    return true;
  }

 private:
  __device__ __forceinline__ int offset(int group) const {
    return min(max(__ldg(offsets_ + group), 0), rows_);
  }
  __device__ __forceinline__ int end_of(int group) const {
    return group < experts_ ? offset(group + 1) : rows_;
  }
  __device__ __forceinline__ int tiles_of(int group) const {
    return ceil_div(max(end_of(group) - offset(group), 0), Tile::kM);
  }

  // first_[g] = row tiles of the groups before g, for g <= experts + 1
  __device__ __forceinline__ void scan(int32_t* warp_sums) {
    const int groups = experts_ + 1, each = ceil_div(groups, Tile::kThreads);
    const int begin = min(int(threadIdx.x) * each, groups), end = min(begin + each, groups);
    int sum = 0;
    for (int g = begin; g < end; ++g) sum += tiles_of(g);
    int warp_total;
    int run = exclusive_scan(sum, threadIdx.x % kWarp, warp_total);
    if (threadIdx.x % kWarp == 0) warp_sums[threadIdx.x / kWarp] = warp_total;
    __syncthreads();
#pragma unroll
    for (int w = 0; w < kWarps - 1; ++w) run += w < int(threadIdx.x) / kWarp ? warp_sums[w] : 0;
    for (int g = begin; g < end; ++g) {
      first_[g] = run;
      run += tiles_of(g);
    }
    if (threadIdx.x == Tile::kThreads - 1) first_[groups] = run;
    __syncthreads();
  }

  int32_t* first_;
  const int32_t* offsets_;
  int experts_, rows_, column_tiles_;
  int64_t tile_;
};

}  // namespace unipool
