// SPDX-License-Identifier: Apache-2.0
// Logits to scores and back, a row at a time: NormRouter, docs/math.md (2), and softmax, (7).
// A Score turns a row of logits z into scores in place, tells the score of a single logit of that
// row by the same arithmetic, and turns the gradient of the scores into that of the logits.
#pragma once
#include "cuda/device/row.cuh"

namespace unipool {

// s = q * relu(u), u = z / (n + eps), n = ||z||_2 over the open experts, q = scale * calibration.
struct NormScore {
  static constexpr bool kZeroIsSilent = true;  // docs/math.md (4)
  float q;
  float eps;

  // Rows whose squares over- or underflow are multiplied by a power of two first. u is unchanged
  // if eps is multiplied, too.
  struct Row {
    float rescale;  // a power of two, 1 for ordinary rows
    float norm;     // of the rescaled row
    float inverse;  // 1 / (norm + rescale * eps)
  };

  template <class L>
  __device__ __forceinline__ static float sum_of_squares(const float (&z)[L::kItems]) {
    float sum = 0.f;
#pragma unroll
    for (int i = 0; i < L::kItems; ++i) sum += z[i] * z[i];
    return group_sum<L::kLanes>(sum);
  }

  // Closed items of z become 0.
  template <class L>
  __device__ __forceinline__ Row measure(float (&z)[L::kItems], uint32_t open) const {
    constexpr float kLeast = 0x1p-60f, kGreatest = 0x1p60f;
#pragma unroll
    for (int i = 0; i < L::kItems; ++i) z[i] = is_open(open, i) ? z[i] : 0.f;
    float squares = sum_of_squares<L>(z);
    float rescale = 1.f;
    const bool extreme = !(squares > kLeast && squares < kGreatest);
    if (__any_sync(kFullMask, extreme)) {
      float largest = 0.f;
#pragma unroll
      for (int i = 0; i < L::kItems; ++i) largest = fmaxf(largest, fabsf(z[i]));
      largest = group_max<L::kLanes>(largest);
      const int exponent = __float_as_uint(largest) >> 23;
      if (extreme && largest > 0.f && exponent < 255) {  // 255: an infinity
        rescale = __uint_as_float(unsigned(max(254 - exponent, 1)) << 23);
      }
#pragma unroll
      for (int i = 0; i < L::kItems; ++i) z[i] *= rescale;
      squares = sum_of_squares<L>(z);
    }
    const float norm = sqrtf(squares);
    return {rescale, norm, 1.f / (norm + rescale * eps)};
  }

  __device__ __forceinline__ float relu_unit(float rescaled, const Row& row) const {
    const float u = rescaled * row.inverse;
    return u <= 0.f ? 0.f : u;  // a NaN stays one
  }

  template <class L>
  __device__ __forceinline__ Row scores(float (&z)[L::kItems], uint32_t open) const {
    const Row row = measure<L>(z, open);
#pragma unroll
    for (int i = 0; i < L::kItems; ++i) z[i] = is_open(open, i) ? q * relu_unit(z[i], row) : 0.f;
    return row;
  }

  __device__ __forceinline__ float score(float logit, const Row& row) const {
    return q * relu_unit(logit * row.rescale, row);
  }

  template <class L>
  __device__ __forceinline__ Slots<L, float> finish_weights(const Slots<L, float>& w) const {
    return w;
  }
  template <class L>
  __device__ __forceinline__ Slots<L, float> start_grads(const Slots<L, float>& grads,
                                                         const Slots<L, float>&) const {
    return grads;
  }

  // z: the row after measure(); g: d loss / d s. z becomes d loss / d z:
  //   q / (n + eps) * (g * [z > 0] - z / n * <g, relu(u)>)
  // Returns <g, relu(u)>, the row's share of d loss / d q.
  template <class L>
  __device__ __forceinline__ float backward(float (&z)[L::kItems], const float (&g)[L::kItems],
                                            uint32_t open, const Row& row) const {
    float dot = 0.f;
#pragma unroll
    for (int i = 0; i < L::kItems; ++i) dot += g[i] * relu_unit(z[i], row);
    dot = group_sum<L::kLanes>(dot);
    const float outer = q * row.inverse * row.rescale;
    const float inner = row.norm == 0.f ? 0.f : dot / row.norm;
#pragma unroll
    for (int i = 0; i < L::kItems; ++i) {
      const float through_relu = z[i] > 0.f ? g[i] : 0.f;
      z[i] = is_open(open, i) ? outer * (through_relu - z[i] * inner) : 0.f;
    }
    return dot;
  }
};

// p = softmax(z) over the open experts; with renormalize, w_j = p_j / sum of the chosen p.
struct SoftmaxScore {
  static constexpr bool kZeroIsSilent = false;  // an exp that underflows is still a choice
  bool renormalize;

  struct Row {
    float largest;
    float inverse;  // 1 / sum of exp(z - largest)
  };

  template <class L>
  __device__ __forceinline__ Row scores(float (&z)[L::kItems], uint32_t open) const {
    float largest = __uint_as_float(0xff800000u);  // -inf
#pragma unroll
    for (int i = 0; i < L::kItems; ++i) {
      if (is_open(open, i)) largest = fmaxf(largest, z[i]);
    }
    largest = group_max<L::kLanes>(largest);
    float sum = 0.f;
#pragma unroll
    for (int i = 0; i < L::kItems; ++i) {
      z[i] = is_open(open, i) ? expf(z[i] - largest) : 0.f;
      sum += z[i];
    }
    const Row row{largest, 1.f / group_sum<L::kLanes>(sum)};
#pragma unroll
    for (int i = 0; i < L::kItems; ++i) z[i] = is_open(open, i) ? z[i] * row.inverse : 0.f;
    return row;
  }
  template <class L>
  __device__ __forceinline__ Row measure(float (&z)[L::kItems], uint32_t open) const {
    return scores<L>(z, open);  // the backward needs no more than p
  }

  __device__ __forceinline__ float score(float logit, const Row& row) const {
    return expf(logit - row.largest) * row.inverse;
  }

  template <class L>
  __device__ __forceinline__ static float slot_sum(const Slots<L, float>& s) {
    float sum = 0.f;
#pragma unroll
    for (int i = 0; i < Slots<L, float>::kEach; ++i) sum += s.v[i];
    return group_sum<L::kLanes>(sum);
  }

  // w: p of the chosen, 0 in slots that are not used.
  template <class L>
  __device__ __forceinline__ Slots<L, float> finish_weights(const Slots<L, float>& w) const {
    if (!renormalize) return w;
    const float sum = slot_sum<L>(w);
    Slots<L, float> result;
#pragma unroll
    for (int i = 0; i < Slots<L, float>::kEach; ++i) {
      result.v[i] = sum == 0.f ? w.v[i] : w.v[i] / sum;
    }
    return result;
  }
  // d loss / d p_j = (grad_j - <grad, w>) / sum, from the gradient of w. p: as above.
  template <class L>
  __device__ __forceinline__ Slots<L, float> start_grads(const Slots<L, float>& grads,
                                                         const Slots<L, float>& p) const {
    if (!renormalize) return grads;
    Slots<L, float> weighted;
#pragma unroll
    for (int i = 0; i < Slots<L, float>::kEach; ++i) weighted.v[i] = grads.v[i] * p.v[i];
    const float sum = slot_sum<L>(p), dot = slot_sum<L>(weighted);
    Slots<L, float> result;
#pragma unroll
    for (int i = 0; i < Slots<L, float>::kEach; ++i) {
      result.v[i] = sum == 0.f ? 0.f : (grads.v[i] - dot / sum) / sum;
    }
    return result;
  }

  // z: p; g: d loss / d p. z becomes d loss / d z = p * (g - <g, p>).
  template <class L>
  __device__ __forceinline__ float backward(float (&z)[L::kItems], const float (&g)[L::kItems],
                                            uint32_t open, const Row&) const {
    float dot = 0.f;
#pragma unroll
    for (int i = 0; i < L::kItems; ++i) dot += g[i] * z[i];
    dot = group_sum<L::kLanes>(dot);
#pragma unroll
    for (int i = 0; i < L::kItems; ++i) z[i] = is_open(open, i) ? z[i] * (g[i] - dot) : 0.f;
    return 0.f;
  }
};

}  // namespace unipool
