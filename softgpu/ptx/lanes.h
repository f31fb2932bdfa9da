// SPDX-License-Identifier: Apache-2.0
// What the handlers share: loops over lanes, registers of any size, and the choice by type.
#pragma once
#include <cstring>
#include <string>
#include <string_view>
#include <type_traits>

#include "ptx/warp.h"

namespace ptx {

using u8 = uint8_t;
using u16 = uint16_t;
using u32 = uint32_t;
using u64 = uint64_t;
using u128 = unsigned __int128;
using s8 = int8_t;
using s16 = int16_t;
using s32 = int32_t;
using s64 = int64_t;
using s128 = __int128;

template <class F>
inline void each(Mask m, F f) {
  for (; m; m &= m - 1) f(__builtin_ctz(m));
}

// The bits of a value in a register that may be wider: integers are extended by their sign.
template <class T>
u64 widened(T v) {
  u64 bits = 0;
  if constexpr (std::is_integral_v<T>) return u64(s64(v));
  memcpy(&bits, &v, sizeof v);
  return bits;
}
inline void put(Warp& w, const Operand& o, int lane, u64 bits) {
  if (o.size == 4)
    w.at<u32>(o)[lane] = u32(bits);
  else if (o.size == 8)
    w.at<u64>(o)[lane] = bits;
  else if (o.size == 2)
    w.at<u16>(o)[lane] = u16(bits);
  else
    w.at<u8>(o)[lane] = u8(bits);
}
// The low bytes of a register.
template <class T>
T take(Warp& w, const Operand& o, int lane) {
  T v;
  memcpy(&v, w.file + o.at + lane * o.size, sizeof v);
  return v;
}

// --- lane by lane: Op::f<R>(a, b, ...)

template <class Op, class R, class A>
void unary(Warp& w, const Instruction& i) {
  R* d = w.at<R>(i.o[0]);
  const A* a = w.at<A>(i.o[1]);
  if (w.mask == ~0u) {
#pragma GCC ivdep
    for (int l = 0; l < kLanes; ++l) d[l] = Op::template f<R>(a[l]);
  } else {
    each(w.mask, [&](int l) { d[l] = Op::template f<R>(a[l]); });
  }
}
template <class Op, class R, class A, class B>
void binary(Warp& w, const Instruction& i) {
  R* d = w.at<R>(i.o[0]);
  const A* a = w.at<A>(i.o[1]);
  const B* b = w.at<B>(i.o[2]);
  if (w.mask == ~0u) {
#pragma GCC ivdep
    for (int l = 0; l < kLanes; ++l) d[l] = Op::template f<R>(a[l], b[l]);
  } else {
    each(w.mask, [&](int l) { d[l] = Op::template f<R>(a[l], b[l]); });
  }
}
template <class Op, class R, class A>
void ternary(Warp& w, const Instruction& i) {
  R* d = w.at<R>(i.o[0]);
  const A* a = w.at<A>(i.o[1]);
  const A* b = w.at<A>(i.o[2]);
  const R* c = w.at<R>(i.o[3]);
  if (w.mask == ~0u) {
#pragma GCC ivdep
    for (int l = 0; l < kLanes; ++l) d[l] = Op::template f<R>(a[l], b[l], c[l]);
  } else {
    each(w.mask, [&](int l) { d[l] = Op::template f<R>(a[l], b[l], c[l]); });
  }
}

#define PTX_UNARY(Name, ...)    \
  struct Name {                 \
    template <class R, class A> \
    static R f(A a) {           \
      return R(__VA_ARGS__);    \
    }                           \
  }
#define PTX_BINARY(Name, ...)            \
  struct Name {                          \
    template <class R, class A, class B> \
    static R f(A a, B b) {               \
      return R(__VA_ARGS__);             \
    }                                    \
  }
#define PTX_TERNARY(Name, ...)  \
  struct Name {                 \
    template <class R, class A> \
    static R f(A a, A b, R c) { \
      return R(__VA_ARGS__);    \
    }                           \
  }

// f.operator()<T>() for the T that `type` names, with .b32 as an unsigned one; null if none.
template <class... T, class F>
Handler of(std::string_view type, F f) {
  const auto is = [&]<class U>() {
    const char kind = std::is_floating_point_v<U> ? 'f'
                      : std::is_signed_v<U>       ? 's'
                      : type.starts_with('b')     ? 'b'
                                                  : 'u';
    return type == kind + std::to_string(8 * sizeof(U));
  };
  Handler h = nullptr;
  ((is.template operator()<T>() ? void(h = f.template operator()<T>()) : void()), ...);
  return h;
}
#define PTX_TYPES(...) __VA_ARGS__
#define PTX_FOR(types, type, ...) of<types>(type, []<class T>() -> Handler { return __VA_ARGS__; })
#define PTX_INTEGERS u16, s16, u32, s32, u64, s64
#define PTX_BITS u16, u32, u64
#define PTX_FLOATS float, double

}  // namespace ptx
