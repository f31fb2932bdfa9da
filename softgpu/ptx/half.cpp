// SPDX-License-Identifier: Apache-2.0
// Arithmetic of f16, bf16 and their pairs. Each is done in double and rounded once.
#include <algorithm>
#include <cmath>

#include "ptx/lanes.h"
#include "ptx/numbers.h"
#include "ptx/opcode.h"

namespace ptx {
namespace {

struct F16 {
  static double get(u16 h) { return of_f16(h); }
  static u16 narrow(double x) { return u16(narrowed(x, kF16, Rounding::nearest)); }
  static constexpr u16 kNan = 0x7fff, kOne = 0x3c00;
};
struct BF16 {
  static double get(u16 h) { return of_bf16(h); }
  static u16 narrow(double x) { return u16(narrowed(x, kBF16, Rounding::nearest)); }
  static constexpr u16 kNan = 0x7fff, kOne = 0x3f80;
};

// x + y rounded to an odd last bit where it is not exact, so that rounding it again to few bits is
// as if it were exact.
double sum_to_odd(double x, double y) {
  const double sum = x + y;
  if (!std::isfinite(sum)) return sum;
  const double part = sum - x, rest = (x - (sum - part)) + (y - part);
  u64 bits;
  memcpy(&bits, &sum, 8);
  if (rest == 0 || bits & 1) return sum;
  return std::nextafter(sum, rest > 0 ? INFINITY : -INFINITY);
}

struct HalfAdd {
  static double f(double a, double b, double) { return sum_to_odd(a, b); }
};
struct HalfSub {
  static double f(double a, double b, double) { return sum_to_odd(a, -b); }
};
struct HalfMul {
  static double f(double a, double b, double) { return a * b; }
};
struct HalfFma {
  static double f(double a, double b, double c) { return sum_to_odd(a * b, c); }
};
struct HalfMax {
  static double f(double a, double b, double) { return greater(a, b); }
};
struct HalfMin {
  static double f(double a, double b, double) { return lesser(a, b); }
};
struct HalfEx2 {
  static double f(double a, double, double) { return std::exp2(a); }
};
struct HalfTanh {
  static double f(double a, double, double) { return std::tanh(a); }
};

constexpr u32 kRelu = 1, kPropagate = 2, kXorSign = 4;  // modes

template <class H, class Op>
u16 half_result(const Instruction& i, u16 a, u16 b, u16 c) {
  double x = H::get(a), y = H::get(b), z = H::get(c);
  const bool negative = (a ^ b) & 0x8000;
  if (i.mode & kXorSign) x = std::fabs(x), y = std::fabs(y);
  u16 r = H::narrow(Op::f(x, y, z));
  if (i.mode & kPropagate && (x != x || y != y)) return H::kNan;
  if (i.mode & kXorSign && negative) r |= 0x8000;
  const bool nan = (r & 0x7fff) > (H::kOne == 0x3c00 ? 0x7c00 : 0x7f80);
  if (i.flush && H::kOne == 0x3c00 && !(r & 0x7c00)) r &= 0x8000;
  if (i.saturate) r = nan || r & 0x8000 ? 0 : std::min(r, H::kOne);
  if (i.mode & kRelu && !nan && r & 0x8000) r = 0;
  return r;
}
template <class H, class Op, int kInputs>
void half(Warp& w, const Instruction& i) {
  const bool pair = i.count == 2;
  each(w.mask, [&](int l) {
    u32 in[3] = {}, r = 0;
    for (int n = 0; n < kInputs; ++n) in[n] = u32(w.lane_value(i.o[1 + n], l));
    for (int h = 0; h < (pair ? 2 : 1); ++h) {
      const u16 x =
          half_result<H, Op>(i, u16(in[0] >> 16 * h), u16(in[1] >> 16 * h), u16(in[2] >> 16 * h));
      r |= u32(x) << 16 * h;
    }
    put(w, i.o[0], l, r);
  });
}
// neg and abs move the sign and nothing else.
template <bool kNegates>
void half_sign(Warp& w, const Instruction& i) {
  const u32 signs = i.count == 2 ? 0x80008000u : 0x8000u;
  each(w.mask, [&](int l) {
    const u32 a = u32(w.lane_value(i.o[1], l));
    put(w, i.o[0], l, kNegates ? a ^ signs : a & ~signs);
  });
}

template <class H>
Handler half_of(const Opcode& op) {
  const std::string& name = op.name();
  if (name == "add") return &half<H, HalfAdd, 2>;
  if (name == "sub") return &half<H, HalfSub, 2>;
  if (name == "mul") return &half<H, HalfMul, 2>;
  if (name == "fma") return &half<H, HalfFma, 3>;
  if (name == "max") return &half<H, HalfMax, 2>;
  if (name == "min") return &half<H, HalfMin, 2>;
  if (name == "neg") return &half_sign<true>;
  if (name == "abs") return &half_sign<false>;
  if (name == "ex2" && op.has("approx")) return &half<H, HalfEx2, 1>;
  if (name == "tanh" && op.has("approx")) return &half<H, HalfTanh, 1>;
  return nullptr;
}

}  // namespace

Handler half_arithmetic(const Opcode& op, Instruction& i) {
  const std::string_view t = op.type();
  i.count = t.ends_with("x2") ? 2 : 1;
  i.flush = op.has("ftz");
  i.saturate = op.has("sat");
  op.allow({"rn"});
  i.mode = (op.has("relu") ? kRelu : 0) | (op.has("NaN") ? kPropagate : 0);
  if (op.has("xorsign")) i.mode |= op.has("abs") ? kXorSign : 0;
  if (t.starts_with("bf16")) return half_of<BF16>(op);
  return t.starts_with("f16") ? half_of<F16>(op) : nullptr;
}

}  // namespace ptx
