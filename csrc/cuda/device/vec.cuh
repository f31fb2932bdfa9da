// SPDX-License-Identifier: Apache-2.0
// Elements in float32 registers, and 16 bytes (or one element) at a time in memory.
#pragma once
#include <cstring>

#include "cuda/device/kernel.cuh"
#include "unipool/types.h"

namespace unipool {

__device__ __forceinline__ float to_float(float v) { return v; }
__device__ __forceinline__ float to_float(__half v) { return __half2float(v); }
__device__ __forceinline__ float to_float(__nv_bfloat16 v) { return __bfloat162float(v); }

template <class T>
__device__ __forceinline__ T from_float(float v);
template <>
__device__ __forceinline__ float from_float<float>(float v) {
  return v;
}
template <>
__device__ __forceinline__ __half from_float<__half>(float v) {
  return __float2half_rn(v);
}
template <>
__device__ __forceinline__ __nv_bfloat16 from_float<__nv_bfloat16>(float v) {
  return __float2bfloat16_rn(v);
}

// The machine word of a given size.
template <int kBytes>
struct Word;
template <>
struct Word<2> {
  using type = unsigned short;
};
template <>
struct Word<4> {
  using type = unsigned;
};
template <>
struct Word<8> {
  using type = uint2;
};
template <>
struct Word<16> {
  using type = uint4;
};

// kCount elements of T as they lie in memory, loaded and stored as one word.
template <class T, int kCount>
struct Vec {
  using W = typename Word<kCount * sizeof(T)>::type;
  W word;

  __device__ __forceinline__ static Vec zero() { return Vec{W{}}; }
  __device__ __forceinline__ static Vec load(const T* p) {
    return Vec{__ldg(reinterpret_cast<const W*>(p))};
  }
  __device__ __forceinline__ void store(T* p) const { __stwb(reinterpret_cast<W*>(p), word); }

  __device__ __forceinline__ void unpack(float* v) const {
    T t[kCount];
    memcpy(t, &word, sizeof t);
#pragma unroll
    for (int i = 0; i < kCount; ++i) v[i] = to_float(t[i]);
  }
  __device__ __forceinline__ static Vec pack(const float* v) {
    T t[kCount];
#pragma unroll
    for (int i = 0; i < kCount; ++i) t[i] = from_float<T>(v[i]);
    Vec r;
    memcpy(&r.word, t, sizeof t);
    return r;
  }
};

}  // namespace unipool
