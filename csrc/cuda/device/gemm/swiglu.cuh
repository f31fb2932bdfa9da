// SPDX-License-Identifier: Apache-2.0
// silu(gate) * up, in float32.
#pragma once
#include <type_traits>

#include "cuda/device/kernel.cuh"

namespace unipool {

// For values of type T: the fast functions are off by some 2^-21, far below a rounding to 16 bits.
template <class T>
__device__ __forceinline__ float sigmoid(float x) {
  if constexpr (std::is_same_v<T, float>) {
    return 1.f / (1.f + expf(-x));
  } else {
    return __fdividef(1.f, 1.f + __expf(-x));
  }
}

template <class T>
__device__ __forceinline__ float swiglu(float gate, float up) {
  return gate * sigmoid<T>(gate) * up;
}

// The product again, and its derivatives.
struct SwigluBwd {
  float value, by_gate, by_up;
};

template <class T>
__device__ __forceinline__ SwigluBwd swiglu_bwd(float gate, float up) {
  const float s = sigmoid<T>(gate), silu = gate * s;
  return {silu * up, (s + silu * (1.f - s)) * up, silu};
}

}  // namespace unipool
