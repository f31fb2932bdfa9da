// SPDX-License-Identifier: Apache-2.0
// From accumulators to global memory. for_each_pair() visits a thread's accumulators with their
// coordinates; OutputTile turns them round through shared memory, so that rows are stored 16 bytes
// per thread, whole cache lines at a time.
//
// An epilogue is: a barrier (the pipeline's memory is reused); for_each_pair with put(); a barrier;
// store() or for_each_chunk(); a barrier before the next multiply(). store_tile() is all of it.
#pragma once
#include <algorithm>
#include <type_traits>

#include "cuda/device/gemm/tile.cuh"
#include "cuda/device/vec.cuh"

namespace unipool {

// f(row, column, v) for the accumulators v[0 .. Tile::kPair) of columns column + 0 ..
template <class Tile, class Acc, class F>
__device__ __forceinline__ void for_each_pair(Acc& acc, const F& f) {
  using namespace cute;
  Tensor where = typename Tile::Mma{}
                     .get_slice(threadIdx.x)
                     .partition_C(make_identity_tensor(Shape<Int<Tile::kM>, Int<Tile::kN>>{}));
  CUTE_UNROLL
  for (int i = 0; i < size(acc); i += Tile::kPair) {
    f(int(get<0>(where(i))), int(get<1>(where(i))), &acc(i));
  }
}

// kM x kN outputs of type Out in shared memory. Rows are 8 elements apart from being contiguous:
// the 8 rows that a warp writes at once then fall into different banks.
template <class Out, int kM, int kN, int kThreads>
struct OutputTile {
  static constexpr int kStride = kN + 8;
  static constexpr size_t kBytes = sizeof(Out) * kM * kStride;
  static constexpr int kChunk = kVectorBytes / int(sizeof(Out));
  static constexpr int kChunks = kN / kChunk;  // of a row
  using Chunk = Vec<Out, kChunk>;

  Out* data;

  // kPair neighbours
  template <int kPair>
  __device__ __forceinline__ void put(int row, int column, const float* v) const {
    using Pair = Vec<Out, kPair>;
    *reinterpret_cast<typename Pair::W*>(data + row * kStride + column) = Pair::pack(v).word;
  }

  // f(row, column, chunk) for every chunk with row < rows and column < columns, row by row.
  template <class F>
  __device__ __forceinline__ void for_each_chunk(int rows, int columns, const F& f) const {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const int row = row_at(i), column = column_at(i);
      if (row < rows && column < columns) f(row, column, data + row * kStride + column);
    }
  }

  // Row r goes to row_of(r), the address of its column 0; kVector: these are multiples of 16 bytes
  // and `columns` one of kChunk.
  template <bool kVector, class RowOf>
  __device__ __forceinline__ void store(int rows, int columns, const RowOf& row_of) const {
    for_each_chunk(rows, columns, [&](int row, int column, const Out* from) {
      Out* to = row_of(row) + column;
      if constexpr (kVector) {
        reinterpret_cast<const Chunk*>(from)->store(to);
      } else {
        for (int i = 0; i < min(columns - column, kChunk); ++i) to[i] = from[i];
      }
    });
  }

  // The same, added to what is there. float32 only.
  template <bool kVector, class RowOf>
  __device__ __forceinline__ void add(int rows, int columns, const RowOf& row_of) const {
    static_assert(std::is_same_v<Out, float>);
    if constexpr (kVector) {
      constexpr int kBatch = 8;  // loads in flight: they cannot overtake the stores before them
      static_assert(kCount % kBatch == 0);
#pragma unroll
      for (int first = 0; first < kCount; first += kBatch) {
        float4 sum[kBatch];
#pragma unroll
        for (int i = 0; i < kBatch; ++i) {
          const int row = row_at(first + i), column = column_at(first + i);
          const bool exists = row < rows && column < columns;
          const float* from = exists ? row_of(row) + column : data;
          sum[i] = *reinterpret_cast<const float4*>(from);
        }
#pragma unroll
        for (int i = 0; i < kBatch; ++i) {
          const int row = row_at(first + i), column = column_at(first + i);
          if (row >= rows || column >= columns) continue;
          const float4 more = *reinterpret_cast<const float4*>(data + row * kStride + column);
          const float4 result{sum[i].x + more.x, sum[i].y + more.y, sum[i].z + more.z,
                              sum[i].w + more.w};
          __stwb(reinterpret_cast<float4*>(row_of(row) + column), result);
        }
      }
    } else {
      for_each_chunk(rows, columns, [&](int row, int column, const Out* from) {
        Out* to = row_of(row) + column;
        for (int i = 0; i < min(columns - column, kChunk); ++i) to[i] += from[i];
      });
    }
  }

 private:
  static constexpr int kCount = kM * kChunks / kThreads;
  static_assert(kM * kChunks % kThreads == 0);

  __device__ __forceinline__ static int row_at(int i) {
    return (threadIdx.x + i * kThreads) / kChunks;
  }
  __device__ __forceinline__ static int column_at(int i) {
    return (threadIdx.x + i * kThreads) % kChunks * kChunk;
  }
};

// Shared memory of a kernel that stores its accumulators as they are, before the schedule's.
template <class Tile, class Out = typename Tile::T>
constexpr size_t kTileBytes =
    std::max(Tile::kPipelineBytes, OutputTile<Out, Tile::kM, Tile::kN, Tile::kThreads>::kBytes);

// The accumulators as they are, to row_of(r), r < rows; added to what is there if `add` is set, for
// which Out must be float. Begins and ends with a barrier.
template <class Tile, bool kVector, class Out, class Acc, class RowOf>
__device__ __forceinline__ void store_tile(Out* smem, Acc& acc, int rows, int columns,
                                           const RowOf& row_of, bool add = false) {
  using Output = OutputTile<Out, Tile::kM, Tile::kN, Tile::kThreads>;
  const Output output{smem};
  __syncthreads();
  for_each_pair<Tile>(acc, [&](int row, int column, const float* v) {
    output.template put<Tile::kPair>(row, column, v);
  });
  __syncthreads();
  if constexpr (std::is_same_v<Out, float>) {
    add ? output.template add<kVector>(rows, columns, row_of)
        : output.template store<kVector>(rows, columns, row_of);
  } else {
    output.template store<kVector>(rows, columns, row_of);
  }
  __syncthreads();
}

}  // namespace unipool
