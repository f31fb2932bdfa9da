// SPDX-License-Identifier: Apache-2.0
// Compiled once per instruction set, with UNIPOOL_ISA naming the namespace. Plain loops that the
// compiler vectorises; everything is in that namespace, so that no two builds share a symbol.
#include "cpu/simd/loops.h"

#include <cmath>
#include <cstring>
#include <limits>
#include <type_traits>
#include <utility>

#ifdef __AVX512BF16__
#include <immintrin.h>
#endif

namespace unipool::cpu::UNIPOOL_ISA {
namespace {

// --- conversions

inline float to_acc(float x) { return x; }
inline double to_acc(double x) { return x; }
inline float to_acc(bf16 x) {
  const uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

template <class T>
inline T from_acc(acc_t<T> x) {
  if constexpr (std::is_same_v<T, bf16>) {  // round to nearest even; a NaN stays one
    uint32_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    const uint32_t nan = (bits >> 16) | 0x40u;
    return bf16{static_cast<uint16_t>((bits & 0x7fffffffu) > 0x7f800000u ? nan : rounded)};
  } else {
    return x;
  }
}

// --- exp that vectorises: 2^n * p(r) with |r| <= ln(2) / 2; error below 2 ulp.

constexpr float kExpMin = -87.33654f;
constexpr float kExpMax = 88.72283f;

inline float power_of_two(int32_t n) {
  const uint32_t bits = static_cast<uint32_t>(n + 127) << 23;
  float value;
  std::memcpy(&value, &bits, sizeof bits);
  return value;
}

// For x in [kExpMin, kExpMax]: exp(x) / 2^n, and n in `power`.
inline float exp_scaled(float x, int32_t& power) {
  constexpr float kLog2e = 1.44269504088896341f;
  constexpr float kLn2High = 0.693359375f;
  constexpr float kLn2Low = -2.12194440e-4f;
  constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
  const float n = (x * kLog2e + kRound) - kRound;
  const float r = (x - n * kLn2High) - n * kLn2Low;
  power = static_cast<int32_t>(n);
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  return p * r * r + r + 1.0f;
}

// For |x| <= -kExpMin; a NaN stays one.
inline float exp_inner(float x) {
  int32_t power;
  const float p = exp_scaled(x, power);
  return p * power_of_two(power);
}

inline float exp_acc(float x) {
  const float clamped = x < kExpMin ? kExpMin : (x > kExpMax ? kExpMax : x);
  int32_t power;
  const float p = exp_scaled(clamped, power);
  const int32_t half = power >> 1;  // two factors: 2^128 alone is out of range
  const float value = p * power_of_two(half) * power_of_two(power - half);
  const float saturated = x > kExpMax ? std::numeric_limits<float>::infinity() : value;
  return x < kExpMin ? 0.0f : (x != x ? x : saturated);
}

inline double exp_acc(double x) { return std::exp(x); }

inline double sigmoid(double x) { return 1 / (1 + exp_acc(-x)); }

// exp(-x) without its special cases: below -87.3 the result is 0, above 87.3 it is 1.
inline float sigmoid(float x) {
  constexpr float kLimit = 87.3f;
  const float clamped = x > kLimit ? kLimit : (x < -kLimit ? -kLimit : x);
  const float value = 1.0f / (1.0f + exp_inner(-clamped));
  return x < -kLimit ? 0.0f : value;
}

// --- sums in a fixed number of lanes: vectorises, and the order never depends on the thread count.

constexpr int kLanes = 16;

template <class A>
constexpr A kInfinity = std::numeric_limits<A>::infinity();

template <class A, class Term>
inline A lane_sum(int64_t n, Term term) {
  A lanes[kLanes] = {};
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    for (int l = 0; l < kLanes; ++l) lanes[l] += term(i + l);
  }
  for (int l = 0; i + l < n; ++l) lanes[l] += term(i + l);
  for (int width = kLanes / 2; width > 0; width /= 2) {
    for (int l = 0; l < width; ++l) lanes[l] += lanes[l + width];
  }
  return lanes[0];
}

template <class A, class Term>
inline A lane_max(int64_t n, Term term) {
  A lanes[kLanes];
  for (int l = 0; l < kLanes; ++l) lanes[l] = -kInfinity<A>;
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    for (int l = 0; l < kLanes; ++l) {
      const A v = term(i + l);
      lanes[l] = v > lanes[l] ? v : lanes[l];
    }
  }
  for (int l = 0; i + l < n; ++l) {
    const A v = term(i + l);
    lanes[l] = v > lanes[l] ? v : lanes[l];
  }
  A best = lanes[0];
  for (int l = 1; l < kLanes; ++l) best = lanes[l] > best ? lanes[l] : best;
  return best;
}

// --- routers

constexpr int64_t kMaxK = 16;

// The order of a choice: NaN is greatest; at equal keys the one that came first stays ahead.
template <class A>
inline bool greater(A a, A b) {
  return a > b || (a != a && b == b);
}

// Whether any of kLanes keys is greater than `bar`, which is no NaN.
template <class A>
inline bool any_greater(const A* key, A bar) {
  int found = 0;
  for (int l = 0; l < kLanes; ++l) found |= !(key[l] <= bar);
  return found != 0;
}

// The k greatest so far, greatest first.
template <class A>
struct Chosen {
  int64_t top_k;
  int32_t* ids;
  int64_t found = 0;
  A best[kMaxK] = {};

  void consider(A key, int64_t e) {
    if (found == top_k && !greater(key, best[top_k - 1])) return;
    int64_t at = found < top_k ? found++ : top_k - 1;
    for (; at > 0 && greater(key, best[at - 1]); --at) {
      best[at] = best[at - 1];
      ids[at] = ids[at - 1];
    }
    best[at] = key;
    ids[at] = static_cast<int32_t>(e);
  }
};

// The k greatest of key[0, M), ties to the lower id, NaN greatest; masked experts are no
// candidates. Slots for which no candidate is left get id -1. Blocks of keys none of which beats
// the k-th so far are passed over as vectors.
template <class A>
void choose(const A* key, const uint8_t* mask, int64_t experts, int64_t top_k, int32_t* ids) {
  Chosen<A> chosen{top_k, ids};
  int64_t e = 0;
  if (mask == nullptr) {
    for (; e < top_k; ++e) chosen.consider(key[e], e);
    for (; e + kLanes <= experts; e += kLanes) {
      const A bar = chosen.best[top_k - 1];
      if (bar != bar || !any_greater(key + e, bar)) continue;
      for (int l = 0; l < kLanes; ++l) chosen.consider(key[e + l], e + l);
    }
  }
  for (; e < experts; ++e) {
    if (mask == nullptr || !mask[e]) chosen.consider(key[e], e);
  }
  for (int64_t j = chosen.found; j < top_k; ++j) ids[j] = -1;
}

// --- choose for k = 1 without a mask: the first greatest of each lane, then of the lanes. Written
// with vector types, as the compiler does not vectorise a search that keeps keys and ids.

template <class A>
struct Lanes {
  static constexpr int kCount = 64 / sizeof(A);
  using Id = std::conditional_t<sizeof(A) == 4, int32_t, int64_t>;
  typedef A Keys __attribute__((vector_size(64)));
  typedef Id Ids __attribute__((vector_size(64)));

  Keys best;
  Ids at;

  template <int... kLane>
  static Ids iota(std::integer_sequence<int, kLane...>) {
    return Ids{kLane...};
  }

  static Ids greater(Keys a, Keys b) { return (a > b) | ((a != a) & (b == b)); }

  void take_where(Ids take, Keys keys, Ids ids) {
    best = take ? keys : best;
    at = take ? ids : at;
  }

  // Lane l against lane l + kWidth, ties to the lower id.
  template <int kWidth, int... kLane>
  void fold(std::integer_sequence<int, kLane...>) {
    const Keys keys = __builtin_shufflevector(best, best, ((kLane + kWidth) % kCount)...);
    const Ids ids = __builtin_shufflevector(at, at, ((kLane + kWidth) % kCount)...);
    take_where(greater(keys, best) | (~greater(best, keys) & (ids < at)), keys, ids);
    if constexpr (kWidth > 1) fold<kWidth / 2>(std::integer_sequence<int, kLane...>());
  }
};

template <class A>
int32_t choose_one(const A* key, int64_t experts) {
  using L = Lanes<A>;
  constexpr int kCount = L::kCount;
  L lanes;
  if (experts >= kCount) {
    std::memcpy(&lanes.best, key, sizeof lanes.best);
  } else {  // lanes without a key have ids beyond the others and lose every tie
    for (int l = 0; l < kCount; ++l) lanes.best[l] = l < experts ? key[l] : -kInfinity<A>;
  }
  lanes.at = L::iota(std::make_integer_sequence<int, kCount>());
  typename L::Ids ids = lanes.at;
  int64_t e = kCount;
  for (; e + kCount <= experts; e += kCount) {
    typename L::Keys keys;
    std::memcpy(&keys, key + e, sizeof keys);
    ids += kCount;
    lanes.take_where(L::greater(keys, lanes.best), keys, ids);
  }
  lanes.template fold<kCount / 2>(std::make_integer_sequence<int, kCount>());
  A best = lanes.best[0];
  auto at = static_cast<int32_t>(lanes.at[0]);
  for (; e < experts; ++e) {
    if (greater(key[e], best)) {
      best = key[e];
      at = static_cast<int32_t>(e);
    }
  }
  return at;
}

// score [M] -> ids, weights; key is scratch for score + bias.
template <class T>
void choose_by_score(const RouterRow<T>& row, const acc_t<T>* score, acc_t<T>* key) {
  const acc_t<T>* by = score;
  if (row.bias != nullptr) {
    for (int64_t e = 0; e < row.experts; ++e) key[e] = score[e] + row.bias[e];
    by = key;
  }
  if (row.top_k == 1 && row.mask == nullptr) {
    row.ids[0] = choose_one(by, row.experts);
  } else {
    choose(by, row.mask, row.experts, row.top_k, row.ids);
  }
  for (int64_t j = 0; j < row.top_k; ++j) {
    row.weights[j] = row.ids[j] < 0 ? acc_t<T>(0) : score[row.ids[j]];
  }
}

// The logits as acc, zero where masked.
template <class T>
void load_logits(const T* logits, const uint8_t* mask, int64_t experts, acc_t<T>* z) {
  for (int64_t e = 0; e < experts; ++e) z[e] = to_acc(logits[e]);
  if (mask != nullptr) {
    for (int64_t e = 0; e < experts; ++e) z[e] = mask[e] ? acc_t<T>(0) : z[e];
  }
}

template <class A>
A norm2(const A* z, int64_t n) {
  const A squares = lane_sum<A>(n, [&](int64_t i) { return z[i] * z[i]; });
  // Near the ends of the range the squares over- or underflow although the norm does not.
  if (squares > A(1e-30) && squares < std::numeric_limits<A>::max()) return std::sqrt(squares);
  const A largest = lane_max<A>(n, [&](int64_t i) { return std::fabs(z[i]); });
  if (!(largest > 0) || !(largest <= std::numeric_limits<A>::max()) || squares != squares) {
    return squares != squares ? squares : largest;
  }
  return largest * std::sqrt(lane_sum<A>(n, [&](int64_t i) {
           const A v = z[i] / largest;
           return v * v;
         }));
}

// body(unit) with unit(z) = z / denominator: by its inverse, unless that would be denormal.
template <class A, class Body>
auto with_quotient(A denominator, Body body) {
  constexpr A kLarge = std::is_same_v<A, float> ? A(1e30) : A(1e300);
  if (denominator < kLarge) {
    const A inverse = A(1) / denominator;
    return body([inverse](A z) { return z * inverse; });
  }
  return body([denominator](A z) { return z / denominator; });
}

template <class A>
inline A relu(A x) {
  return x <= A(0) ? A(0) : x;  // a NaN stays one
}

template <class T>
void norm_topk(const RouterRow<T>& row, acc_t<T> coef, acc_t<T> eps) {
  using A = acc_t<T>;
  A* __restrict__ score = row.scratch;
  A* __restrict__ importance = row.importance;
  const int64_t experts = row.experts;
  load_logits(row.logits, row.mask, experts, score);
  with_quotient(norm2(score, experts) + eps, [&](auto unit) {
    for (int64_t e = 0; e < experts; ++e) {
      const A s = coef * relu(unit(score[e]));
      score[e] = s;
      importance[e] += s;
    }
  });
  choose_by_score(row, score, row.scratch + row.experts);
  for (int64_t j = 0; j < row.top_k; ++j) {
    if (row.weights[j] == A(0)) row.ids[j] = -1;  // silent: docs/math.md (4)
  }
}

// g[e] = grad_importance[e] + the weight gradient of the slot that chose e.
template <class T>
void score_grad(const RouterRowBwd<T>& row, acc_t<T>* g) {
  using A = acc_t<T>;
  for (int64_t e = 0; e < row.experts; ++e) {
    g[e] = row.grad_importance != nullptr ? row.grad_importance[e] : A(0);
  }
  if (row.grad_weights == nullptr) return;
  for (int64_t j = 0; j < row.top_k; ++j) {
    const int32_t e = row.ids[j];
    if (e >= 0 && e < row.experts) g[e] += row.grad_weights[j];
  }
}

// s = coef * relu(u), u = z / (n + eps), n = |z|:
// dz = coef / (n + eps) * (g * [z > 0] - z / n * <g, relu(u)>), d coef = <g, relu(u)>
template <class T>
acc_t<T> norm_topk_bwd(const RouterRowBwd<T>& row, acc_t<T> coef, acc_t<T> eps) {
  using A = acc_t<T>;
  const int64_t experts = row.experts;
  A* __restrict__ z = row.scratch;
  A* __restrict__ g = row.scratch + experts;
  T* __restrict__ grad_logits = row.grad_logits;
  load_logits(row.logits, row.mask, experts, z);
  score_grad(row, g);
  const A norm = norm2(z, experts);
  const A denominator = norm + eps;
  const A dot = with_quotient(denominator, [&](auto unit) {
    return lane_sum<A>(experts, [&](int64_t e) { return g[e] * relu(unit(z[e])); });
  });
  const A outer = coef / denominator;
  const A inner = norm > A(0) || norm != norm ? dot / norm : A(0);
  for (int64_t e = 0; e < experts; ++e) {
    const A through_relu = z[e] > A(0) ? g[e] : (z[e] != z[e] ? z[e] : A(0));
    grad_logits[e] = from_acc<T>(outer * (through_relu - z[e] * inner));
  }
  return dot;
}

// p [M] = softmax over the experts that are not masked; all zero if every expert is.
template <class T>
void softmax(const T* logits, const uint8_t* mask, int64_t experts, acc_t<T>* p) {
  using A = acc_t<T>;
  constexpr A kHidden = -kInfinity<A>;
  bool any = false;
  for (int64_t e = 0; e < experts; ++e) {
    const bool hidden = mask != nullptr && mask[e];
    any = any || !hidden;
    p[e] = hidden ? kHidden : to_acc(logits[e]);
  }
  const A largest = lane_max<A>(experts, [&](int64_t e) { return p[e]; });
  for (int64_t e = 0; e < experts; ++e) p[e] = exp_acc(p[e] - largest);
  if (mask != nullptr) {  // also when a NaN or an infinity made largest useless
    for (int64_t e = 0; e < experts; ++e) p[e] = mask[e] ? A(0) : p[e];
  }
  if (!any) return;
  const A sum = lane_sum<A>(experts, [&](int64_t e) { return p[e]; });
  for (int64_t e = 0; e < experts; ++e) p[e] /= sum;
}

template <class T>
void softmax_topk(const RouterRow<T>& row, bool renormalize) {
  using A = acc_t<T>;
  A* p = row.scratch;
  softmax(row.logits, row.mask, row.experts, p);
  for (int64_t e = 0; e < row.experts; ++e) row.importance[e] += p[e];
  choose_by_score(row, p, row.scratch + row.experts);
  if (!renormalize) return;
  A sum = 0;
  for (int64_t j = 0; j < row.top_k; ++j) sum += row.weights[j];
  if (sum == A(0)) return;
  for (int64_t j = 0; j < row.top_k; ++j) row.weights[j] /= sum;
}

// dz = p * (g - <g, p>); with renormalisation w_j = p_j / s, s = sum of the chosen:
// dp_j = (gw_j - <gw, w>) / s.
template <class T>
void softmax_topk_bwd(const RouterRowBwd<T>& row, bool renormalize) {
  using A = acc_t<T>;
  A* p = row.scratch;
  A* g = row.scratch + row.experts;
  softmax(row.logits, row.mask, row.experts, p);
  RouterRowBwd<T> direct = row;
  A chosen_grad[kMaxK];
  if (renormalize && row.grad_weights != nullptr) {
    A sum = 0;
    A dot = 0;
    for (int64_t j = 0; j < row.top_k; ++j) {
      const int32_t e = row.ids[j];
      if (e < 0 || e >= row.experts) continue;
      sum += p[e];
      dot += row.grad_weights[j] * p[e];
    }
    for (int64_t j = 0; j < row.top_k; ++j) {
      chosen_grad[j] = sum == A(0) ? A(0) : (row.grad_weights[j] - dot / sum) / sum;
    }
    direct.grad_weights = chosen_grad;
  }
  score_grad(direct, g);
  const A dot = lane_sum<A>(row.experts, [&](int64_t e) { return g[e] * p[e]; });
  for (int64_t e = 0; e < row.experts; ++e) row.grad_logits[e] = from_acc<T>(p[e] * (g[e] - dot));
}

// --- rows

template <class T>
void axpy(acc_t<T> weight, const T* x, acc_t<T>* sum, int64_t n) {
  for (int64_t i = 0; i < n; ++i) sum[i] += weight * to_acc(x[i]);
}

template <class T>
acc_t<T> dot(const T* a, const T* b, int64_t n) {
  return lane_sum<acc_t<T>>(n, [&](int64_t i) { return to_acc(a[i]) * to_acc(b[i]); });
}

template <class T>
void store(acc_t<T> scale, const acc_t<T>* x, T* y, int64_t n) {
  int64_t i = 0;
#ifdef __AVX512BF16__
  if constexpr (std::is_same_v<T, bf16>) {  // an instruction that no compiler finds in from_acc
    const __m512 by = _mm512_set1_ps(scale);
    for (; i + 16 <= n; i += 16) {
      const __m512 v = _mm512_mul_ps(by, _mm512_loadu_ps(x + i));
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(y + i), (__m256i)_mm512_cvtneps_pbh(v));
    }
  }
#endif
  for (; i < n; ++i) y[i] = from_acc<T>(scale * x[i]);
}

template <class T>
void widen(const T* x, acc_t<T>* y, int64_t n) {
  for (int64_t i = 0; i < n; ++i) y[i] = to_acc(x[i]);
}

// --- tiles

constexpr int64_t kBlock = 16;  // side of the blocks in which a transpose goes through a buffer

// out[j * ld + r] = in(r, j) for r in [0, count), j in [0, n)
template <class Out, class In>
inline void transpose_blocks(int64_t count, int64_t n, Out* out, int64_t ld, In in) {
  for (int64_t r0 = 0; r0 < count; r0 += kBlock) {
    const int64_t rows = count - r0 < kBlock ? count - r0 : kBlock;
    for (int64_t j0 = 0; j0 < n; j0 += kBlock) {
      const int64_t columns = n - j0 < kBlock ? n - j0 : kBlock;
      Out buffer[kBlock][kBlock];
      for (int64_t r = 0; r < rows; ++r) {
        for (int64_t j = 0; j < columns; ++j) buffer[r][j] = in(r0 + r, j0 + j);
      }
      for (int64_t j = 0; j < columns; ++j) {
        for (int64_t r = 0; r < rows; ++r) out[(j0 + j) * ld + r0 + r] = buffer[r][j];
      }
    }
  }
}

template <class Out>
inline void zero_columns(Out* out, int64_t n, int64_t from, int64_t ld) {
  if (from == ld) return;
  for (int64_t j = 0; j < n; ++j) std::memset(out + j * ld + from, 0, (ld - from) * sizeof(Out));
}

template <class T>
void transpose(const T* const* rows, int64_t count, int64_t n, acc_t<T>* out, int64_t ld) {
  transpose_blocks(count, n, out, ld, [&](int64_t r, int64_t j) { return to_acc(rows[r][j]); });
  zero_columns(out, n, count, ld);
}

void transpose_narrow(const bf16* const* rows, int64_t count, int64_t n, bf16* out, int64_t ld) {
  transpose_blocks(count, n, out, ld, [&](int64_t r, int64_t j) { return rows[r][j]; });
  zero_columns(out, n, count, ld);
}

void transpose_pairs(const bf16* const* rows, int64_t count, int64_t n, bf16* out, int64_t ld) {
  auto* pairs = reinterpret_cast<uint32_t*>(out);
  transpose_blocks(count, n / 2, pairs, ld, [&](int64_t r, int64_t j) {
    uint32_t pair;
    std::memcpy(&pair, rows[r] + 2 * j, sizeof pair);
    return pair;
  });
  zero_columns(pairs, n / 2, count, ld);
}

void interleave(const bf16* const* rows, int64_t count, int64_t n, bf16* out) {
  auto* pairs = reinterpret_cast<uint32_t*>(out);
  for (int64_t r = 0; r + 1 < count; r += 2) {
    const bf16* low = rows[r];
    const bf16* high = rows[r + 1];
    uint32_t* row = pairs + r / 2 * n;
    for (int64_t j = 0; j < n; ++j) row[j] = uint32_t(low[j].bits) | uint32_t(high[j].bits) << 16;
  }
  if (count % 2 != 0) {
    for (int64_t j = 0; j < n; ++j) pairs[count / 2 * n + j] = rows[count - 1][j].bits;
  }
}

template <class T>
void store_transposed(const acc_t<T>* tile, int64_t ld, int64_t count, int64_t n,
                      const acc_t<T>* scale, T* const* rows, int64_t column) {
  for (int64_t r0 = 0; r0 < count; r0 += kBlock) {
    const int64_t block_rows = count - r0 < kBlock ? count - r0 : kBlock;
    for (int64_t j0 = 0; j0 < n; j0 += kBlock) {
      const int64_t columns = n - j0 < kBlock ? n - j0 : kBlock;
      acc_t<T> buffer[kBlock][kBlock];
      for (int64_t j = 0; j < columns; ++j) {
        for (int64_t r = 0; r < block_rows; ++r) buffer[r][j] = tile[(j0 + j) * ld + r0 + r];
      }
      for (int64_t r = 0; r < block_rows; ++r) {
        const acc_t<T> by = scale != nullptr ? scale[r0 + r] : acc_t<T>(1);
        T* row = rows[r0 + r] + column + j0;
        for (int64_t j = 0; j < columns; ++j) row[j] = from_acc<T>(by * buffer[r][j]);
      }
    }
  }
}

constexpr int64_t kChunk = 128;  // elements that SwiGLU keeps in local arrays

template <class T>
void swiglu(const acc_t<T>* gate, const acc_t<T>* up, T* preact_gate, T* preact_up, T* hidden,
            int64_t n) {
  using A = acc_t<T>;
  for (int64_t at = 0; at < n; at += kChunk) {
    const int64_t count = n - at < kChunk ? n - at : kChunk;
    A h[kChunk];
    for (int64_t i = 0; i < count; ++i) h[i] = gate[at + i] * sigmoid(gate[at + i]) * up[at + i];
    store<T>(1, h, hidden + at, count);
  }
  if (preact_gate == nullptr) return;
  store<T>(1, gate, preact_gate, n);
  store<T>(1, up, preact_up, n);
}

// Outputs may lie on the inputs of the same name, so everything goes through local arrays.
template <class T>
acc_t<T> swiglu_bwd(const acc_t<T>* grad, const T* gate, const T* up, acc_t<T> weight, T* grad_gate,
                    T* grad_up, T* hidden, int64_t n) {
  using A = acc_t<T>;
  A total = 0;
  for (int64_t at = 0; at < n; at += kChunk) {
    const int64_t count = n - at < kChunk ? n - at : kChunk;
    A g[kChunk], u[kChunk], h[kChunk], terms[kChunk];
    for (int64_t i = 0; i < count; ++i) g[i] = to_acc(gate[at + i]);
    for (int64_t i = 0; i < count; ++i) u[i] = to_acc(up[at + i]);
    for (int64_t i = 0; i < count; ++i) {
      const A s = sigmoid(g[i]);
      const A silu = g[i] * s;
      const A d = weight * grad[at + i];
      h[i] = weight * (silu * u[i]);
      terms[i] = grad[at + i] * (silu * u[i]);
      g[i] = d * u[i] * (s + silu * (A(1) - s));
      u[i] = d * silu;
    }
    store<T>(1, g, grad_gate + at, count);
    store<T>(1, u, grad_up + at, count);
    store<T>(1, h, hidden + at, count);
    total += lane_sum<A>(count, [&](int64_t i) { return terms[i]; });
  }
  return total;
}

}  // namespace

template <class T>
const Loops<T>& table() {
  static const Loops<T> loops = [] {
    Loops<T> t{};
    t.norm_topk = norm_topk<T>;
    t.norm_topk_bwd = norm_topk_bwd<T>;
    t.softmax_topk = softmax_topk<T>;
    t.softmax_topk_bwd = softmax_topk_bwd<T>;
    t.axpy = axpy<T>;
    t.dot = dot<T>;
    t.store = store<T>;
    t.widen = widen<T>;
    t.transpose = transpose<T>;
    t.store_transposed = store_transposed<T>;
    t.swiglu = swiglu<T>;
    t.swiglu_bwd = swiglu_bwd<T>;
    if constexpr (std::is_same_v<T, bf16>) {
      t.transpose_narrow = transpose_narrow;
      t.transpose_pairs = transpose_pairs;
      t.interleave = interleave;
    }
    return t;
  }();
  return loops;
}

template const Loops<float>& table<float>();
template const Loops<double>& table<double>();
template const Loops<bf16>& table<bf16>();

}  // namespace unipool::cpu::UNIPOOL_ISA
