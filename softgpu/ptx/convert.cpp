// SPDX-License-Identifier: Apache-2.0
// cvt. The type may be narrower than the register.
#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "ptx/lanes.h"
#include "ptx/numbers.h"
#include "ptx/opcode.h"

namespace ptx {
namespace {

long double to_integral(long double x, Rounding r) {
  if (r == Rounding::zero) return truncl(x);
  if (r == Rounding::down) return floorl(x);
  return r == Rounding::up ? ceill(x) : nearbyintl(x);
}

// --- the common conversions

template <class D, class S>
D integer_of(S s, Rounding r) {
  const double x = r == Rounding::zero   ? std::trunc(double(s))
                   : r == Rounding::down ? std::floor(double(s))
                   : r == Rounding::up   ? std::ceil(double(s))
                                         : std::nearbyint(double(s));
  const auto low = double(std::numeric_limits<D>::min());
  const auto high = double(std::numeric_limits<D>::max());
  if (x != x) return 0;
  return x <= low    ? std::numeric_limits<D>::min()
         : x >= high ? std::numeric_limits<D>::max()
                     : D(x);
}
template <class D, class S>
D saturated(S s) {
  return D(std::clamp<s128>(s, std::numeric_limits<D>::min(), std::numeric_limits<D>::max()));
}
template <class D, class S>
void convert(Warp& w, const Instruction& i) {
  constexpr bool kFromFloat = std::is_floating_point_v<S>, kToFloat = std::is_floating_point_v<D>;
  each(w.mask, [&](int l) {
    const S s = take<S>(w, i.o[1], l);
    D d;
    if constexpr (kFromFloat && !kToFloat)
      d = integer_of<D>(s, Rounding(i.mode));
    else if constexpr (!kFromFloat && !kToFloat)
      d = i.saturate ? saturated<D>(s) : D(s);
    else
      d = D(s);
    put(w, i.o[0], l, widened(d));
  });
}

template <u16 (*kNarrow)(float), bool kPair>
void narrow(Warp& w, const Instruction& i) {
  each(w.mask, [&](int l) {
    u32 r = kNarrow(take<float>(w, i.o[1], l));
    if (kPair) r = r << 16 | kNarrow(take<float>(w, i.o[2], l));
    put(w, i.o[0], l, r);
  });
}
template <float (*kWiden)(u16)>
void widen(Warp& w, const Instruction& i) {
  each(w.mask, [&](int l) { put(w, i.o[0], l, widened(kWiden(take<u16>(w, i.o[1], l)))); });
}

// --- any other: by way of a long double, which holds every value of every type

struct Type {
  const char* name;
  int bits;
  char kind;  // s, u, or f
  Format format;
};
const Type kTypes[] = {
    {"s8", 8, 's', {}},       {"u8", 8, 'u', {}},       {"s16", 16, 's', {}},
    {"u16", 16, 'u', {}},     {"s32", 32, 's', {}},     {"u32", 32, 'u', {}},
    {"s64", 64, 's', {}},     {"u64", 64, 'u', {}},     {"f16", 16, 'f', kF16},
    {"bf16", 16, 'f', kBF16}, {"tf32", 32, 'f', kTF32}, {"f32", 32, 'f', kF32},
    {"f64", 64, 'f', kF64},   {"e4m3", 8, 'f', kE4M3},  {"e5m2", 8, 'f', kE5M2},
};
const Type* type_named(std::string_view name) {
  for (const Type& t : kTypes)
    if (name == t.name) return &t;
  return nullptr;
}

long double value_of(const Type& t, u64 bits) {
  if (t.kind == 'u') return (long double)(t.bits == 64 ? bits : bits & ((1ull << t.bits) - 1));
  if (t.kind == 's') return (long double)(s64(bits << (64 - t.bits)) >> (64 - t.bits));
  if (t.bits == 64) {
    double x;
    memcpy(&x, &bits, 8);
    return x;
  }
  // Every smaller format is the top of a float or the whole of a half.
  if (t.format.mantissa == kF16.mantissa && t.bits == 16) return of_f16(u16(bits));
  if (t.bits == 16) return of_bf16(u16(bits));
  if (t.bits == 32) {
    float x;
    const u32 b = u32(bits);
    memcpy(&x, &b, 4);
    return x;
  }
  if (t.format.mantissa == 2) return of_f16(u16(bits << 8));  // e5m2
  const int exponent = bits >> 3 & 15, mantissa = bits & 7;
  if ((bits & 127) == 127) return NAN;
  const double x = exponent ? std::ldexp(8 + mantissa, exponent - 10) : std::ldexp(mantissa, -9);
  return bits & 128 ? -x : x;
}

constexpr u32 kIntegral = 16, kRelu = 32, kFinite = 64;  // beside the rounding in `mode`

// i.offset: the places of both types in the table.
u64 converted(const Instruction& i, u64 bits) {
  const Type &to = kTypes[i.offset >> 8], &from = kTypes[i.offset & 255];
  const auto rounding = Rounding(i.mode & 15);
  long double x = value_of(from, bits);
  if (i.flush && std::fpclassify(float(x)) == FP_SUBNORMAL) x = std::copysign(0.0L, x);
  if (to.kind != 'f') {
    if (x != x) return 0;
    const long double low = to.kind == 'u' ? 0 : -ldexpl(1, to.bits - 1);
    const long double high = ldexpl(1, to.bits - (to.kind == 's')) - 1;
    x = std::clamp(to_integral(x, rounding), low, high);
    return to.kind == 'u' ? u64(x) : u64(s64(x));
  }
  const bool integral = i.mode & kIntegral;
  if (integral) x = to_integral(x, rounding);
  if (i.saturate) x = x > 0 ? std::min(x, 1.0L) : 0.0L;
  if (i.mode & kRelu && std::signbit(x)) x = x != x ? x : 0;
  u64 r = narrowed(x, to.format, integral ? Rounding::nearest : rounding, i.mode & kFinite);
  if (to.bits == 32 && to.format.mantissa == kTF32.mantissa) r = r << 13 | (x != x ? 0x1fff : 0);
  if (i.flush && to.format.mantissa == kF32.mantissa && !(r & 0x7f800000)) r &= 0x80000000;
  return r;
}

void convert_any(Warp& w, const Instruction& i) {
  each(w.mask, [&](int l) { put(w, i.o[0], l, converted(i, w.lane_value(i.o[1], l))); });
}
// Two results in one register: of two operands (the first one is the upper), or of a pair.
void convert_pair(Warp& w, const Instruction& i) {
  const int to = kTypes[i.offset >> 8].bits, from = kTypes[i.offset & 255].bits;
  each(w.mask, [&](int l) {
    const u64 a = w.lane_value(i.o[1], l);
    const u64 high = i.o.size() > 2 ? a : a >> from;
    const u64 low = i.o.size() > 2 ? w.lane_value(i.o[2], l) : a;
    put(w, i.o[0], l, (converted(i, high) << to) | converted(i, low));
  });
}

template <class D>
Handler common_to(std::string_view from) {
  return of<u8, s8, PTX_INTEGERS, PTX_FLOATS>(from,
                                              []<class S>() -> Handler { return &convert<D, S>; });
}

}  // namespace

Handler conversion(const Opcode& op, Instruction& i) {
  std::string_view from = op.type(), to = op.type(1);
  if (from.empty() || to.empty()) return nullptr;
  const std::string_view mode =
      op.one_of({"rn", "rz", "rm", "rp", "rna", "rni", "rzi", "rmi", "rpi"});
  const bool integral = mode.ends_with('i');
  const std::string_view direction = integral ? mode.substr(0, 2) : mode;
  const Rounding rounding = direction == "rz"    ? Rounding::zero
                            : direction == "rm"  ? Rounding::down
                            : direction == "rp"  ? Rounding::up
                            : direction == "rna" ? Rounding::away
                                                 : Rounding::nearest;
  i.saturate = op.has("sat");
  i.flush = op.has("ftz");
  i.mode = u32(rounding);
  const bool relu = op.has("relu"), finite = op.has("satfinite");
  const bool plain = !i.flush && !relu && !finite;
  const auto is_float = [](std::string_view t) { return t.find('f') != t.npos || t[0] == 'e'; };
  if (plain && mode == "rn" && from == "f32" && !i.saturate) {
    if (to == "f16") return &narrow<f16_of, false>;
    if (to == "bf16") return &narrow<bf16_of, false>;
    if (to == "f16x2") return &narrow<f16_of, true>;
    if (to == "bf16x2") return &narrow<bf16_of, true>;
  }
  if (plain && mode.empty() && to == "f32" && !i.saturate) {
    if (from == "f16") return &widen<of_f16>;
    if (from == "bf16") return &widen<of_bf16>;
  }
  const bool float_result = is_float(to);
  const bool common = plain && !(float_result && (integral || i.saturate)) &&
                      !(float_result && rounding != Rounding::nearest);
  if (common) {
    const Handler h = of<u8, s8, PTX_INTEGERS, PTX_FLOATS>(
        to, [from]<class D>() -> Handler { return common_to<D>(from); });
    if (h) return h;
  }
  const bool pair = to.ends_with("x2");
  if (pair) to.remove_suffix(2);
  if (pair && from.ends_with("x2")) from.remove_suffix(2);
  const Type *t = type_named(to), *f = type_named(from);
  if (!t || !f) return nullptr;
  i.offset = (t - kTypes) << 8 | (f - kTypes);
  i.mode |=
      (integral ? kIntegral : 0) | (relu ? kRelu : 0) | (finite || t->bits == 8 ? kFinite : 0);
  return pair ? &convert_pair : &convert_any;
}

}  // namespace ptx
