// SPDX-License-Identifier: Apache-2.0
// Arithmetic of integers and floats, and special functions.
#include <immintrin.h>

#include <algorithm>
#include <cmath>
#include <limits>

#include "ptx/lanes.h"
#include "ptx/numbers.h"
#include "ptx/opcode.h"

namespace ptx {
namespace {

template <class T>
T divide(T a, T b) {
  if constexpr (std::is_integral_v<T>) {
    if (b == 0) throw Error("division by zero");
    if constexpr (std::is_signed_v<T>) {
      if (b == -1) return T(0) - a;
    }
  }
  return a / b;
}
// Too large divisors give 0, as the manual has it of div.approx.
float divide_approx(float a, float b) {
  if (std::fabs(b) > 0x1p126f && !std::isinf(b) && b == b) {
    if (a != a || std::isinf(a)) return NAN;
    return std::copysign(0.0f, std::signbit(a) == std::signbit(b) ? 1.0f : -1.0f);
  }
  return a / b;
}
template <class T>
T maximum(T a, T b) {
  if constexpr (std::is_floating_point_v<T>) return greater(a, b);
  return a > b ? a : b;
}
template <class T>
T minimum(T a, T b) {
  if constexpr (std::is_floating_point_v<T>) return lesser(a, b);
  return a < b ? a : b;
}
template <class T>
T clamped(s64 v) {
  return T(std::clamp<s64>(v, std::numeric_limits<T>::min(), std::numeric_limits<T>::max()));
}
template <class T>
T absolute(T a) {
  if constexpr (std::is_floating_point_v<T>) return std::fabs(a);
  return a < 0 ? T(0) - a : a;
}
// Only the upper half of an approximation of a double is written.
double upper_half(double x) {
  u64 b;
  memcpy(&b, &x, 8);
  b &= ~0xffffffffull;
  memcpy(&x, &b, 8);
  return x;
}

PTX_BINARY(Add, a + b);
PTX_BINARY(Sub, a - b);
PTX_BINARY(Mul, R(a) * R(b));
PTX_BINARY(AddSat, clamped<R>(s64(a) + s64(b)));
PTX_BINARY(SubSat, clamped<R>(s64(a) - s64(b)));
PTX_BINARY(MulHigh, (s128(a) * s128(b)) >> (8 * sizeof(R)));
PTX_BINARY(Div, divide<A>(a, b));
PTX_BINARY(DivApprox, divide_approx(a, b));
PTX_BINARY(Max, maximum<A>(a, b));
PTX_BINARY(Min, minimum<A>(a, b));
PTX_BINARY(MaxRelu, std::max(maximum<A>(a, b), A(0)));
PTX_BINARY(MinRelu, std::max(minimum<A>(a, b), A(0)));
PTX_BINARY(MaxNan, a != a || b != b ? A(NAN) : greater(a, b));
PTX_BINARY(MinNan, a != a || b != b ? A(NAN) : lesser(a, b));
PTX_BINARY(CopySign, std::copysign(b, a));  // the sign of a, the magnitude of b
PTX_TERNARY(Mad, R(a) * R(b) + c);
PTX_TERNARY(MadHigh, R(s128(a) * s128(b) >> (8 * sizeof(R))) + c);
PTX_TERNARY(MadHighSat, clamped<R>((s64(a) * s64(b) >> 32) + s64(c)));
PTX_TERNARY(Fma, std::fma(a, b, c));
PTX_UNARY(Neg, -a);
PTX_UNARY(Abs, absolute<A>(a));
PTX_UNARY(Sqrt, std::sqrt(a));
PTX_UNARY(Rcp, A(1) / a);
PTX_UNARY(Rsqrt, A(1) / std::sqrt(a));
PTX_UNARY(RcpUpper, upper_half(1 / a));
PTX_UNARY(RsqrtUpper, upper_half(1 / std::sqrt(a)));
PTX_UNARY(Ex2, std::exp2(a));
PTX_UNARY(Lg2, std::log2(a));
PTX_UNARY(Tanh, std::tanh(a));
PTX_UNARY(Sin, std::sin(a));
PTX_UNARY(Cos, std::cos(a));

// The library's functions look at the bits of a subnormal, whatever MXCSR says.
template <class Op>
struct Flushed {
  template <class R, class A>
  static R f(A a) {
    return Op::template f<R>(std::fabs(a) < std::numeric_limits<A>::min() ? std::copysign(A(0), a)
                                                                          : a);
  }
};
template <class Op>
Handler function(const Opcode& op, Instruction& i) {
  const bool flush = op.has("ftz");
  return with_modes(op, i, flush ? &unary<Flushed<Op>, float, float> : &unary<Op, float, float>);
}

constexpr u32 kFlush = 0x8040;  // MXCSR: subnormal results, and subnormal operands, are zeros
u32 rounding_bits(std::string_view mode) {
  return mode == "rm" ? 0x2000 : mode == "rp" ? 0x4000 : mode == "rz" ? 0x6000 : 0;
}

// min and max leave a subnormal as it came, whatever MXCSR says.
void flush_results(Warp& w, const Operand& o) {
  if (o.size != 4) return;
  each(w.mask, [&](int l) {
    u32& bits = w.at<u32>(o)[l];
    if (!(bits & 0x7f800000)) bits &= 0x80000000;
  });
}
template <class T>
void saturate(Warp& w, const Operand& o) {
  each(w.mask, [&](int l) {
    T& x = w.at<T>(o)[l];
    x = x > 0 ? std::min(x, T(1)) : T(0);  // a NaN too becomes 0
  });
}

// The inner handler is called by a pointer, so that no arithmetic leaves the bracket.
void in_mode(Warp& w, const Instruction& i) {
  const u32 old = _mm_getcsr();
  _mm_setcsr((old & ~0x6000u) | i.mode | (i.flush ? kFlush : 0));
  i.inner(w, i);
  _mm_setcsr(old);
  if (i.flush) flush_results(w, i.o[0]);
  if (i.saturate && i.o[0].size == 8) saturate<double>(w, i.o[0]);
  if (i.saturate && i.o[0].size == 4) saturate<float>(w, i.o[0]);
}

Handler widening_product(const Opcode& op, bool mad) {
  const std::string_view t = op.type();
  if (t == "u16") return mad ? &ternary<Mad, u32, u16> : Handler(&binary<Mul, u32, u16, u16>);
  if (t == "s16") return mad ? &ternary<Mad, s32, s16> : Handler(&binary<Mul, s32, s16, s16>);
  if (t == "u32") return mad ? &ternary<Mad, u64, u32> : Handler(&binary<Mul, u64, u32, u32>);
  if (t == "s32") return mad ? &ternary<Mad, s64, s32> : Handler(&binary<Mul, s64, s32, s32>);
  return nullptr;
}

Handler of_floats(const Opcode& op, Instruction& i) {
  const std::string& name = op.name();
  const std::string_view t = op.type();
  if (name == "add") return with_modes(op, i, PTX_FOR(PTX_FLOATS, t, &binary<Add, T, T, T>));
  if (name == "sub") return with_modes(op, i, PTX_FOR(PTX_FLOATS, t, &binary<Sub, T, T, T>));
  if (name == "mul") return with_modes(op, i, PTX_FOR(PTX_FLOATS, t, &binary<Mul, T, T, T>));
  if (name == "fma" || name == "mad")
    return with_modes(op, i, PTX_FOR(PTX_FLOATS, t, &ternary<Fma, T, T>));
  if (name == "div") {
    if (op.one_of({"approx", "full"}) == "approx")
      return t == "f32" ? with_modes(op, i, &binary<DivApprox, float, float, float>) : nullptr;
    return with_modes(op, i, PTX_FOR(PTX_FLOATS, t, &binary<Div, T, T, T>));
  }
  if (name == "max" || name == "min") {
    const bool max = name == "max";
    if (op.has("NaN")) {
      if (t != "f32") return nullptr;
      return with_modes(
          op, i, max ? &binary<MaxNan, float, float, float> : &binary<MinNan, float, float, float>);
    }
    return with_modes(op, i,
                      max ? PTX_FOR(PTX_FLOATS, t, &binary<Max, T, T, T>)
                          : PTX_FOR(PTX_FLOATS, t, &binary<Min, T, T, T>));
  }
  if (name == "neg") return with_modes(op, i, PTX_FOR(PTX_FLOATS, t, &unary<Neg, T, T>));
  if (name == "abs") return with_modes(op, i, PTX_FOR(PTX_FLOATS, t, &unary<Abs, T, T>));
  if (name == "copysign") return PTX_FOR(PTX_FLOATS, t, &binary<CopySign, T, T, T>);
  return nullptr;
}

Handler of_integers(const Opcode& op, Instruction& i) {
  const std::string& name = op.name();
  const std::string_view t = op.type();
  if (op.has("cc")) {
    if (name == "add" || name == "sub" || name == "mad") return carry_arithmetic(op, i);
    return nullptr;
  }
  if (name == "add" || name == "sub") {
    const bool add = name == "add";
    if (op.has("sat")) {
      if (t != "s32") return nullptr;
      return add ? &binary<AddSat, s32, s32, s32> : &binary<SubSat, s32, s32, s32>;
    }
    return add ? PTX_FOR(PTX_INTEGERS, t, &binary<Add, T, T, T>)
               : PTX_FOR(PTX_INTEGERS, t, &binary<Sub, T, T, T>);
  }
  if (name == "mul" || name == "mad") {
    const bool mad = name == "mad";
    const std::string_view part = op.one_of({"lo", "hi", "wide"});
    if (part == "wide") return widening_product(op, mad);
    if (part == "hi" && mad && op.has("sat"))
      return t == "s32" ? &ternary<MadHighSat, s32, s32> : nullptr;
    if (part == "hi")
      return mad ? PTX_FOR(PTX_INTEGERS, t, &ternary<MadHigh, T, T>)
                 : PTX_FOR(PTX_INTEGERS, t, &binary<MulHigh, T, T, T>);
    if (part == "lo")
      return mad ? PTX_FOR(PTX_INTEGERS, t, &ternary<Mad, T, T>)
                 : PTX_FOR(PTX_INTEGERS, t, &binary<Mul, T, T, T>);
  }
  if (name == "div") return PTX_FOR(PTX_INTEGERS, t, &binary<Div, T, T, T>);
  if (name == "max" || name == "min") {
    const bool max = name == "max";
    if (op.has("relu")) {
      if (t != "s32") return nullptr;
      return max ? &binary<MaxRelu, s32, s32, s32> : &binary<MinRelu, s32, s32, s32>;
    }
    return max ? PTX_FOR(PTX_INTEGERS, t, &binary<Max, T, T, T>)
               : PTX_FOR(PTX_INTEGERS, t, &binary<Min, T, T, T>);
  }
  if (name == "neg") return PTX_FOR(PTX_TYPES(s16, s32, s64), t, &unary<Neg, T, T>);
  if (name == "abs") return PTX_FOR(PTX_TYPES(s16, s32, s64), t, &unary<Abs, T, T>);
  return nullptr;
}

}  // namespace

Handler with_modes(const Opcode& op, Instruction& i, Handler inner) {
  i.mode = rounding_bits(op.one_of({"rn", "rz", "rm", "rp"}));
  i.flush = op.has("ftz");
  i.saturate = op.has("sat");
  if (!i.mode && !i.flush && !i.saturate) return inner;
  i.inner = inner;
  return inner ? &in_mode : nullptr;
}

Handler arithmetic(const Opcode& op, Instruction& i) {
  const std::string_view t = op.type();
  if (t.find("f16") != t.npos) return half_arithmetic(op, i);
  if (t.starts_with("f")) return of_floats(op, i);
  return of_integers(op, i);
}

Handler special_function(const Opcode& op, Instruction& i) {
  const std::string& name = op.name();
  const std::string_view t = op.type();
  if (t.find("f16") != t.npos) return half_arithmetic(op, i);
  const bool approx = op.has("approx");
  if (t == "f64" && approx && op.has("ftz")) {
    if (name == "rcp") return &unary<RcpUpper, double, double>;
    if (name == "rsqrt") return &unary<RsqrtUpper, double, double>;
    return nullptr;
  }
  if (name == "sqrt") return with_modes(op, i, PTX_FOR(PTX_FLOATS, t, &unary<Sqrt, T, T>));
  if (name == "rcp") return with_modes(op, i, PTX_FOR(PTX_FLOATS, t, &unary<Rcp, T, T>));
  if (name == "rsqrt") return with_modes(op, i, PTX_FOR(PTX_FLOATS, t, &unary<Rsqrt, T, T>));
  if (t != "f32" || !approx) return nullptr;
  if (name == "ex2") return function<Ex2>(op, i);
  if (name == "lg2") return function<Lg2>(op, i);
  if (name == "tanh") return function<Tanh>(op, i);
  if (name == "sin") return function<Sin>(op, i);
  if (name == "cos") return function<Cos>(op, i);
  return nullptr;
}

}  // namespace ptx
