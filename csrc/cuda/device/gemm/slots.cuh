// SPDX-License-Identifier: Apache-2.0
// The slots that sorted rows hold, where tokens' rows are, and chunks of rows in global memory.
#pragma once
#include "cuda/device/gemm/schedule.cuh"
#include "cuda/device/vec.cuh"

namespace unipool {

// What a plan says about N rows and slots; a value outside [0, N) says "none".
__device__ __forceinline__ int checked_index(const int32_t* plan, int64_t at, int64_t rows) {
  const int index = __ldg(plan + at);
  return unsigned(index) < unsigned(rows) ? index : -1;
}

// The row of a slot's token in x [T, width]. Without a slot any row will do: nothing of it is kept.
template <class T>
__device__ __forceinline__ const T* token_row(const T* x, int slot, int top_k, int64_t width) {
  return x + (slot < 0 ? 0 : slot / top_k) * width;
}

// slots[r], r < kM: of row r of a tile, -1 where it has none: past the tile's rows or the last
// expert's. Thread r does row r. To be followed by a barrier.
template <class Tile>
__device__ __forceinline__ void find_slots(int32_t* slots, const RowTile& tile,
                                           const int32_t* order, int64_t rows, int experts) {
  static_assert(Tile::kM <= Tile::kThreads);
  const int r = threadIdx.x;
  if (r >= Tile::kM) return;
  const bool exists = r < tile.rows && tile.expert < experts;
  slots[r] = exists ? checked_index(order, tile.row + r, rows) : -1;
}

// --- chunks of a row: kVectorBytes at once, or those of the row's `left` elements one by one

template <class T>
constexpr int kChunkOf = kVectorBytes / int(sizeof(T));
template <class T>
using Chunk = Vec<T, kChunkOf<T>>;

// For memory that this thread writes later on, so not by the read-only path; nobody else reads it.
template <bool kVector, class T>
__device__ __forceinline__ Chunk<T> load_once(const T* from, int left) {
  if constexpr (kVector) {
    return {__ldcs(reinterpret_cast<const typename Chunk<T>::W*>(from))};
  } else {
    T t[kChunkOf<T>];
#pragma unroll
    for (int i = 0; i < kChunkOf<T>; ++i) t[i] = i < left ? from[i] : T(0.f);
    Chunk<T> chunk;
    memcpy(&chunk.word, t, sizeof t);
    return chunk;
  }
}

template <bool kVector, class T>
__device__ __forceinline__ void store_chunk(const Chunk<T>& chunk, T* to, int left) {
  if constexpr (kVector) {
    chunk.store(to);
  } else {
    T t[kChunkOf<T>];
    memcpy(t, &chunk.word, sizeof t);
#pragma unroll
    for (int i = 0; i < kChunkOf<T>; ++i) {
      if (i < left) to[i] = t[i];
    }
  }
}

template <class T>
__device__ __forceinline__ Chunk<T> shared_chunk(const T* from) {
  return {*reinterpret_cast<const typename Chunk<T>::W*>(from)};
}

// out[t] = 0 for tokens t whose only slot has no row: what the whole grid has to do beside storing
// the others. out [rows, width].
template <bool kVector, class T>
__device__ __forceinline__ void zero_dropped_tokens(const int32_t* inverse, T* out, int64_t rows,
                                                    int width) {
  const int lane = threadIdx.x % kWarp, warps = blockDim.x / kWarp;
  const int64_t warp = int64_t(blockIdx.x) * warps + threadIdx.x / kWarp;
  for (int64_t first = warp * kWarp; first < rows; first += int64_t(gridDim.x) * warps * kWarp) {
    const bool dropped = first + lane < rows && checked_index(inverse, first + lane, rows) < 0;
    for (unsigned left = __ballot_sync(kFullMask, dropped); left != 0; left &= left - 1) {
      T* row = out + (first + __ffs(int(left)) - 1) * width;
      for (int at = lane * kChunkOf<T>; at < width; at += kWarp * kChunkOf<T>) {
        store_chunk<kVector>(Chunk<T>::zero(), row + at, width - at);
      }
    }
  }
}

}  // namespace unipool
