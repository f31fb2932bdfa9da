// SPDX-License-Identifier: Apache-2.0
// Arithmetic that only integers have.
#include <algorithm>
#include <limits>

#include "ptx/lanes.h"
#include "ptx/opcode.h"

namespace ptx {
namespace {

template <class T>
T remainder_of(T a, T b) {
  if (b == 0) throw Error("division by zero");
  if constexpr (std::is_signed_v<T>) {
    if (b == -1) return 0;
  }
  return a % b;
}
PTX_BINARY(Rem, remainder_of<A>(a, b));

struct Sad {
  template <class R, class A>
  static R f(A a, A b, R c) {
    return R(c + (a < b ? R(b) - R(a) : R(a) - R(b)));
  }
};

// The product of the low 24 bits, of which a half is kept.
template <class T>
s64 product24(T a, T b) {
  return (s64(a) << 40 >> 40) * (s64(b) << 40 >> 40);
}
template <>
s64 product24(u32 a, u32 b) {
  return s64(u64(a & 0xffffff) * u64(b & 0xffffff));
}
PTX_BINARY(Mul24Low, product24<A>(a, b));
PTX_BINARY(Mul24High, product24<A>(a, b) >> 16);
PTX_TERNARY(Mad24Low, product24<A>(a, b) + c);
PTX_TERNARY(Mad24High, R(product24<A>(a, b) >> 16) + c);

// mode: the first half of b is used (0) or the second (1).
template <class A, class B, int kParts>
void dot(Warp& w, const Instruction& i) {
  each(w.mask, [&](int l) {
    u32 sum = take<u32>(w, i.o[3], l);
    const u32 a = take<u32>(w, i.o[1], l), b = take<u32>(w, i.o[2], l);
    for (int p = 0; p < kParts; ++p) {
      const int wide = 32 / kParts;
      const u32 x = a >> (wide * p), y = b >> (8 * (p + (kParts == 2 ? 2 * int(i.mode) : 0)));
      const s32 left = kParts == 4 ? s32(A(x)) : std::is_signed_v<A> ? s32(s16(x)) : s32(u16(x));
      sum += u32(left * s32(B(y)));
    }
    put(w, i.o[0], l, sum);
  });
}
template <int kParts>
Handler dot_of(std::string_view a, std::string_view b) {
  if (a == "s32" && b == "s32") return &dot<s8, s8, kParts>;
  if (a == "s32" && b == "u32") return &dot<s8, u8, kParts>;
  if (a == "u32" && b == "s32") return &dot<u8, s8, kParts>;
  if (a == "u32" && b == "u32") return &dot<u8, u8, kParts>;
  return nullptr;
}

// --- with the carry: add.cc, addc, sub.cc, subc, mad.cc, madc

constexpr u32 kReads = 1, kSets = 2;  // modes

template <class T, bool kSubtract>
void carry_sum(Warp& w, const Instruction& i, const T* a, const T* b) {
  Mask out = w.carry;
  T* d = w.at<T>(i.o[0]);
  each(w.mask, [&](int l) {
    const u128 in = i.mode & kReads ? w.carry >> l & 1 : 0;
    const u128 sum = kSubtract ? u128(a[l]) - b[l] - in : u128(a[l]) + b[l] + in;
    d[l] = T(sum);
    out = (out & ~(Mask(1) << l)) | Mask(sum >> (8 * sizeof(T)) & 1) << l;
  });
  if (i.mode & kSets) w.carry = out;
}
template <class T, bool kSubtract>
void carry_binary(Warp& w, const Instruction& i) {
  carry_sum<T, kSubtract>(w, i, w.at<T>(i.o[1]), w.at<T>(i.o[2]));
}
template <class T, bool kHigh>
void carry_mad(Warp& w, const Instruction& i) {
  T product[kLanes] = {};
  const T *a = w.at<T>(i.o[1]), *b = w.at<T>(i.o[2]);
  each(w.mask, [&](int l) {
    using Wide = std::conditional_t<std::is_signed_v<T>, s128, u128>;
    product[l] = T(Wide(a[l]) * Wide(b[l]) >> (kHigh ? 8 * sizeof(T) : 0));
  });
  // The sum is one of bits, whatever the sign.
  using Bits = std::make_unsigned_t<T>;
  carry_sum<Bits, false>(w, i, reinterpret_cast<const Bits*>(product), w.at<Bits>(i.o[3]));
}

}  // namespace

Handler carry_arithmetic(const Opcode& op, Instruction& i) {
  const std::string& name = op.name();
  i.mode = (name.ends_with('c') ? kReads : 0) | (op.has("cc") ? kSets : 0);
  std::string type(op.type());
  if (name.starts_with("mad")) {
    if (op.has("hi")) return PTX_FOR(PTX_TYPES(u32, s32, u64, s64), type, &carry_mad<T, true>);
    if (op.has("lo")) return PTX_FOR(PTX_TYPES(u32, s32, u64, s64), type, &carry_mad<T, false>);
    return nullptr;
  }
  type[0] = 'u';  // the sum of bits
  if (name.starts_with("sub")) return PTX_FOR(PTX_TYPES(u32, u64), type, &carry_binary<T, true>);
  return PTX_FOR(PTX_TYPES(u32, u64), type, &carry_binary<T, false>);
}

Handler integer_arithmetic(const Opcode& op, Instruction& i) {
  const std::string& name = op.name();
  const std::string_view type = op.type();
  if (name == "rem") return PTX_FOR(PTX_INTEGERS, type, &binary<Rem, T, T, T>);
  if (name == "sad") return PTX_FOR(PTX_INTEGERS, type, &ternary<Sad, std::make_unsigned_t<T>, T>);
  if (name == "mul24") {
    if (op.has("hi")) return PTX_FOR(PTX_TYPES(u32, s32), type, &binary<Mul24High, T, T, T>);
    if (op.has("lo")) return PTX_FOR(PTX_TYPES(u32, s32), type, &binary<Mul24Low, T, T, T>);
  }
  if (name == "mad24") {
    if (op.has("hi")) return PTX_FOR(PTX_TYPES(u32, s32), type, &ternary<Mad24High, T, T>);
    if (op.has("lo")) return PTX_FOR(PTX_TYPES(u32, s32), type, &ternary<Mad24Low, T, T>);
  }
  if (name == "dp4a") return dot_of<4>(op.type(1), type);
  if (name == "dp2a") {
    i.mode = op.one_of({"lo", "hi"}) == "hi";
    return dot_of<2>(op.type(1), type);
  }
  return nullptr;
}

}  // namespace ptx
