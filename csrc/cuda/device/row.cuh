// SPDX-License-Identifier: Apache-2.0
// One token's row of M logits, spread over a group of lanes and held in registers.
#pragma once
#include "cuda/device/vec.cuh"
#include "cuda/device/warp.cuh"
#include "unipool/limits.h"

namespace unipool {

// kLanes lanes hold a row, kItems experts each, loaded kVec at a time: item i of a lane is expert
// id(lane, i), which grows with i. A warp works on kGroups = 32 / kLanes tokens at once.
template <class T_, int kLanes_, int kItems_, int kVec_>
struct RowLayout {
  using T = T_;
  static constexpr int kLanes = kLanes_, kItems = kItems_, kVec = kVec_;
  static constexpr int kGroups = kWarp / kLanes;
  static constexpr int kLoads = kItems / kVec;
  // Blocks of 256 threads that share a multiprocessor, forward and backward: bounds the registers
  // (255, 128 or 80) so that nothing spills.
  static constexpr int kResident = kItems > 16 ? 1 : kItems > 12 ? 2 : 3;
  static constexpr int kResidentBwd = kItems > 16 ? 1 : kItems > 8 ? 2 : 3;
  static_assert(kItems % kVec == 0 && kItems <= 32 && kWarp % kLanes == 0);
  using V = Vec<T, kVec>;

  __device__ __forceinline__ static int id(int lane, int item) {
    return (item / kVec * kLanes + lane) * kVec + item % kVec;
  }
};

// A row as it came from memory, so that the next one can be on its way.
template <class L>
struct RawRow {
  typename L::V v[L::kLoads];

  // row: of M logits, M a multiple of L::kVec; null loads zeros
  __device__ __forceinline__ void load(const typename L::T* row, int experts, int lane) {
#pragma unroll
    for (int c = 0; c < L::kLoads; ++c) {
      const int e = L::id(lane, c * L::kVec);
      v[c] = row != nullptr && e < experts ? L::V::load(row + e) : L::V::zero();
    }
  }
  __device__ __forceinline__ void unpack(float (&z)[L::kItems]) const {
#pragma unroll
    for (int c = 0; c < L::kLoads; ++c) v[c].unpack(z + c * L::kVec);
  }
};

template <class L>
__device__ __forceinline__ void store_row(const float (&z)[L::kItems], typename L::T* row,
                                          int experts, int lane) {
#pragma unroll
  for (int c = 0; c < L::kLoads; ++c) {
    const int e = L::id(lane, c * L::kVec);
    if (e < experts) L::V::pack(z + c * L::kVec).store(row + e);
  }
}

// Bit i: item i is an expert that exists and is not masked.
template <class L>
__device__ __forceinline__ uint32_t open_items(const uint8_t* mask, int experts, int lane) {
  uint32_t open = 0;
#pragma unroll
  for (int i = 0; i < L::kItems; ++i) {
    const int e = L::id(lane, i);
    if (e < experts && !(mask != nullptr && mask[e])) open |= 1u << i;
  }
  return open;
}
__device__ __forceinline__ bool is_open(uint32_t open, int item) { return open >> item & 1; }

// The id of the group's greatest key, which is then out; ties go to the lower id. -1 if all keys
// are 0. Every lane gets the id, and the key in `best`.
template <class L>
__device__ __forceinline__ int take_best(uint32_t (&key)[L::kItems], int lane, uint32_t& best) {
  constexpr unsigned kNone = 0x7fffffffu;
  best = 0;
  unsigned id = kNone;
#pragma unroll
  for (int i = 0; i < L::kItems; ++i) {
    if (key[i] > best) {  // a lane's ids ascend, so the first of equals stays
      best = key[i];
      id = L::id(lane, i);
    }
  }
  if constexpr (L::kLanes == kWarp) {
    const uint32_t top = __reduce_max_sync(kFullMask, best);
    id = __reduce_min_sync(kFullMask, best == top ? id : kNone);
    best = top;
  } else {
#pragma unroll
    for (int d = L::kLanes / 2; d > 0; d /= 2) {
      const uint32_t other = __shfl_xor_sync(kFullMask, best, d);
      const unsigned other_id = __shfl_xor_sync(kFullMask, id, d);
      if (other > best || (other == best && other_id < id)) {
        best = other;
        id = other_id;
      }
    }
  }
#pragma unroll
  for (int i = 0; i < L::kItems; ++i) {
    if (unsigned(L::id(lane, i)) == id) key[i] = 0;
  }
  return best != 0 ? int(id) : -1;
}

// One value for each of a token's slots: lane j of the group holds slots j, j + kLanes, ...
template <class L, class V>
struct Slots {
  static constexpr int kEach = (kTopKLimit + L::kLanes - 1) / L::kLanes;
  V v[kEach];

  __device__ __forceinline__ static int slot(int lane, int i) { return lane + i * L::kLanes; }
  __device__ __forceinline__ void set(int lane, int j, V value) {
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      if (slot(lane, i) == j) v[i] = value;
    }
  }
  // The value of slot j, in every lane of the group.
  __device__ __forceinline__ V get(int j) const {
    V mine = v[0];
#pragma unroll
    for (int i = 1; i < kEach; ++i) {
      if (j / L::kLanes == i) mine = v[i];
    }
    return __shfl_sync(kFullMask, mine, j % L::kLanes, L::kLanes);
  }
};

}  // namespace unipool
