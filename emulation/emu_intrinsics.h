// SPDX-License-Identifier: Apache-2.0
// Device functions of CUDA, by their names. Each collective is a `combine` over the arguments that
// the lanes left; see emu.h.
#pragma once

// ---- block and warp synchronisation ----
inline void __syncthreads(EMU_SITE) { emu::block_barrier("__syncthreads", 0, 0, true, emu_site); }
inline int __syncthreads_count(int p, EMU_SITE) {
  int r = p != 0;
  emu::block_barrier("__syncthreads_count", 0, 0, true, emu_site, &r);
  return r;
}
inline int __syncthreads_or(int p, EMU_SITE) { return __syncthreads_count(p, emu_site) != 0; }
inline int __syncthreads_and(int p, EMU_SITE) { return __syncthreads_count(!p, emu_site) == 0; }
inline void __syncwarp(unsigned m = ~0u, EMU_SITE) {
  emu::warp_collective("__syncwarp", m, emu_site, nullptr, nullptr);
}
inline void __threadfence() {}
inline void __threadfence_block() {}
inline void __threadfence_system() {}
inline void __nanosleep(unsigned) { emu::yield(); }
[[noreturn]] inline void __trap(EMU_SITE) { emu::fatal("__trap()", emu_site); }

// ---- shuffles ----
template <class T>
T __shfl_sync(unsigned m, T v, int src, int w = 32, EMU_SITE) {
  int l = emu::lane(), b = l & ~(w - 1);
  return emu::shfl("__shfl_sync", m, v, b + (src & (w - 1)), emu_site);
}
template <class T>
T __shfl_xor_sync(unsigned m, T v, int x, int w = 32, EMU_SITE) {
  int l = emu::lane(), s = l ^ x;
  return emu::shfl("__shfl_xor_sync", m, v, (s & ~(w - 1)) > (l & ~(w - 1)) ? l : s, emu_site);
}
template <class T>
T __shfl_up_sync(unsigned m, T v, unsigned d, int w = 32, EMU_SITE) {
  int l = emu::lane(), s = l - int(d);
  return emu::shfl("__shfl_up_sync", m, v, s < (l & ~(w - 1)) ? l : s, emu_site);
}
template <class T>
T __shfl_down_sync(unsigned m, T v, unsigned d, int w = 32, EMU_SITE) {
  int l = emu::lane(), s = l + int(d);
  return emu::shfl("__shfl_down_sync", m, v, s > (l | (w - 1)) ? l : s, emu_site);
}

// ---- votes, reductions, match ----
inline unsigned __ballot_sync(unsigned m, int p, EMU_SITE) {
  return emu::all_lanes<unsigned>("__ballot_sync", m, p, emu_site, [](uint32_t k, const int* v) {
    unsigned r = 0;
    for (int i = 0; i < 32; ++i)
      if ((k >> i & 1) && v[i]) r |= 1u << i;
    return r;
  });
}
inline int __any_sync(unsigned m, int p, EMU_SITE) { return __ballot_sync(m, p, emu_site) != 0; }
inline int __all_sync(unsigned m, int p, EMU_SITE) { return __ballot_sync(m, p, emu_site) == m; }
#define EMU_REDUCE(NAME, T, INIT, EXPR)                                          \
  inline T NAME(unsigned m, T x, EMU_SITE) {                                     \
    return emu::all_lanes<T>(#NAME, m, x, emu_site, [](uint32_t k, const T* v) { \
      T r = INIT;                                                                \
      for (int i = 0; i < 32; ++i)                                               \
        if (k >> i & 1) {                                                        \
          T a = r, b = v[i];                                                     \
          r = EXPR;                                                              \
        }                                                                        \
      return r;                                                                  \
    });                                                                          \
  }
EMU_REDUCE(__reduce_add_sync, unsigned, 0u, a + b)
EMU_REDUCE(__reduce_add_sync, int, 0, int(unsigned(a) + unsigned(b)))
EMU_REDUCE(__reduce_max_sync, unsigned, 0u, a > b ? a : b)
EMU_REDUCE(__reduce_max_sync, int, INT32_MIN, a > b ? a : b)
EMU_REDUCE(__reduce_min_sync, unsigned, ~0u, a < b ? a : b)
EMU_REDUCE(__reduce_min_sync, int, INT32_MAX, a < b ? a : b)
EMU_REDUCE(__reduce_or_sync, unsigned, 0u, a | b)
EMU_REDUCE(__reduce_and_sync, unsigned, ~0u, a& b)
EMU_REDUCE(__reduce_xor_sync, unsigned, 0u, a ^ b)
template <class T>
unsigned __match_any_sync(unsigned m, T x, EMU_SITE) {
  struct All {
    unsigned r[32];
  };
  All a = emu::all_lanes<All>("__match_any_sync", m, x, emu_site, [](uint32_t k, const T* v) {
    All o{};
    for (int i = 0; i < 32; ++i)
      for (int j = 0; j < 32; ++j)
        if ((k >> i & 1) && (k >> j & 1) && v[i] == v[j]) o.r[i] |= 1u << j;
    return o;
  });
  return a.r[emu::lane()];
}

// ---- atomics (blocks and fibers run on one OS thread, so plain read-modify-write is atomic) ----
template <class T>
__forceinline__ T atomicAdd(T* p, emu::same_t<T> v) {
  return emu::atomic(p, [&](T o) { return T(o + v); });
}
template <class T>
__forceinline__ T atomicSub(T* p, emu::same_t<T> v) {
  return emu::atomic(p, [&](T o) { return T(o - v); });
}
template <class T>
__forceinline__ T atomicMax(T* p, emu::same_t<T> v) {
  return emu::atomic(p, [&](T o) { return o > v ? o : v; });
}
template <class T>
__forceinline__ T atomicMin(T* p, emu::same_t<T> v) {
  return emu::atomic(p, [&](T o) { return o < v ? o : v; });
}
template <class T>
__forceinline__ T atomicOr(T* p, emu::same_t<T> v) {
  return emu::atomic(p, [&](T o) { return T(o | v); });
}
template <class T>
__forceinline__ T atomicAnd(T* p, emu::same_t<T> v) {
  return emu::atomic(p, [&](T o) { return T(o & v); });
}
template <class T>
__forceinline__ T atomicExch(T* p, emu::same_t<T> v) {
  emu::yield();
  return emu::atomic(p, [&](T) { return v; });
}
template <class T>
__forceinline__ T atomicCAS(T* p, emu::same_t<T> c, emu::same_t<T> v) {
  emu::yield();
  return emu::atomic(p, [&](T o) { return o == c ? v : o; });
}

// ---- loads, bit tricks, maths that glibc lacks ----
namespace emu {
template <class T>
T* aligned(T* p, const char* what, Site site) {
  if (uintptr_t(p) % sizeof(T)) misaligned(what, sizeof(T), site);
  return p;
}
}  // namespace emu
template <class T>
T __ldg(const T* p, EMU_SITE) {
  return *emu::aligned(p, "__ldg", emu_site);
}
template <class T>
T __ldcg(const T* p, EMU_SITE) {
  return *emu::aligned(p, "__ldcg", emu_site);
}
template <class T>
T __ldcs(const T* p, EMU_SITE) {
  return *emu::aligned(p, "__ldcs", emu_site);
}
template <class T>
void __stcg(T* p, emu::same_t<T> v, EMU_SITE) {
  *emu::aligned(p, "__stcg", emu_site) = v;
}
template <class T>
void __stwb(T* p, emu::same_t<T> v, EMU_SITE) {
  *emu::aligned(p, "__stwb", emu_site) = v;
}
template <class T>
void __stcs(T* p, emu::same_t<T> v, EMU_SITE) {
  *emu::aligned(p, "__stcs", emu_site) = v;
}
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __clz(int x) { return x ? __builtin_clz(unsigned(x)) : 32; }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __popcll(unsigned long long x) { return __builtin_popcountll(x); }
inline unsigned __brev(unsigned x) {
  unsigned r = 0;
  for (int i = 0; i < 32; ++i) r |= (x >> i & 1) << (31 - i);
  return r;
}
template <class D, class S>
D emu_bits(S s) {
  static_assert(sizeof(D) == sizeof(S));
  D d;
  std::memcpy(&d, &s, sizeof d);
  return d;
}
inline unsigned __float_as_uint(float f) { return emu_bits<unsigned>(f); }
inline int __float_as_int(float f) { return emu_bits<int>(f); }
inline float __uint_as_float(unsigned u) { return emu_bits<float>(u); }
inline float __int_as_float(int u) { return emu_bits<float>(u); }
inline float rsqrtf(float x) { return float(1.0 / std::sqrt(double(x))); }
inline float __expf(float x) { return std::exp(x); }
inline float __fdividef(float a, float b) { return a / b; }
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
template <class A, class B>
constexpr std::common_type_t<A, B> max(A a, B b) {
  std::common_type_t<A, B> x = a, y = b;
  return x < y ? y : x;
}
template <class A, class B>
constexpr std::common_type_t<A, B> min(A a, B b) {
  std::common_type_t<A, B> x = a, y = b;
  return y < x ? y : x;
}
