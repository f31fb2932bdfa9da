// SPDX-License-Identifier: Apache-2.0
// Logic, shifts, and fields of bits.
#include <algorithm>

#include "ptx/lanes.h"
#include "ptx/opcode.h"

namespace ptx {
namespace {

template <class T>
constexpr int kBits = 8 * sizeof(T);

template <class T>
T reversed(T a) {
  u64 r = 0;
  for (int b = 0; b < kBits<T>; ++b) r |= u64(a >> b & 1) << (kBits<T> - 1 - b);
  return T(r);
}
// The position of the highest bit that is not the sign (of unsigned: that is set); -1 if none.
template <class T>
int highest(T a) {
  if constexpr (std::is_signed_v<T>) {
    if (a < 0) a = ~a;
  }
  return a ? 63 - __builtin_clzll(u64(a)) : -1;
}
template <class T>
T field(T a, u32 position, u32 length) {
  constexpr u32 n = kBits<T>;
  position &= 255, length &= 255;
  if (length == 0) return 0;
  const bool sign = std::is_signed_v<T> && (a >> std::min(position + length - 1, n - 1) & 1);
  T r = position < n ? T(a >> position) : std::is_signed_v<T> && a < 0 ? T(-1) : T(0);
  if (length < n) {
    const T ones = T((T(1) << length) - 1);
    r = sign ? T(r | ~ones) : T(r & ones);
  }
  return r;
}
template <class T>
T inserted(T a, T b, u32 position, u32 length) {
  position &= 255, length &= 255;
  if (position >= u32(kBits<T>) || length == 0) return b;
  const T ones = length >= u32(kBits<T>) ? T(~T(0)) : T((T(1) << length) - 1);
  const T mask = T(ones << position);
  return T((b & ~mask) | (T(a << position) & mask));
}
u32 mask_of(u32 position, u32 length, bool clamp) {
  if (!clamp) position &= 31, length &= 31;
  if (position >= 32 || length == 0) return 0;
  return (length >= 32 ? ~0u : (1u << length) - 1) << position;
}
template <class T>
T extended(T a, u32 length, bool clamp) {
  if (!clamp) length &= 31;
  if (length >= 32) return a;
  if (length == 0) return 0;
  return T(a << (32 - length)) >> (32 - length);
}
// The position of the n-th bit of a that is set, from a start: up if n > 0, down if n < 0, or the
// bit at the start itself.
u32 nth_set(u32 a, u32 start, s32 n) {
  if (n == 0) return start < 32 && (a >> start & 1) ? start : ~0u;
  const int step = n > 0 ? 1 : -1;
  int left = std::abs(n);
  for (int b = int(start); b >= 0 && b < 32; b += step)
    if (a >> b & 1 && --left == 0) return u32(b);
  return ~0u;
}

PTX_BINARY(And, a& b);
PTX_BINARY(Or, a | b);
PTX_BINARY(Xor, a ^ b);
PTX_BINARY(Shl, b >= u32(kBits<A>) ? A(0) : A(a << b));
PTX_BINARY(Shr, b >= u32(kBits<A>) ? A(a < 0 ? -1 : 0) : A(a >> b));
PTX_UNARY(Not, ~a);
PTX_UNARY(Cnot, a == 0);
PTX_UNARY(Popc, __builtin_popcountll(a));
PTX_UNARY(Brev, reversed<A>(a));
PTX_UNARY(Clz, a ? __builtin_clzll(u64(a)) - (64 - kBits<A>) : kBits<A>);
PTX_UNARY(Bfind, highest<A>(a));
PTX_UNARY(BfindShift, highest<A>(a) < 0 ? -1 : kBits<A> - 1 - highest<A>(a));

enum Logic { kAnd, kOr, kXor, kNot };
template <Logic kOp>
void predicates(Warp& w, const Instruction& i) {
  const Mask a = w.predicate(i.o[1]), b = kOp == kNot ? 0 : w.predicate(i.o[2]);
  w.set_predicate(i.o[0], kOp == kAnd ? a & b : kOp == kOr ? a | b : kOp == kXor ? a ^ b : ~a);
}

template <class T>
void bfe(Warp& w, const Instruction& i) {
  each(w.mask, [&](int l) {
    const T r = field(take<T>(w, i.o[1], l), take<u32>(w, i.o[2], l), take<u32>(w, i.o[3], l));
    put(w, i.o[0], l, widened(r));
  });
}
template <class T>
void bfi(Warp& w, const Instruction& i) {
  each(w.mask, [&](int l) {
    put(w, i.o[0], l,
        inserted(take<T>(w, i.o[1], l), take<T>(w, i.o[2], l), take<u32>(w, i.o[3], l),
                 take<u32>(w, i.o[4], l)));
  });
}
template <bool kClamp>
void bmsk(Warp& w, const Instruction& i) {
  each(w.mask, [&](int l) {
    put(w, i.o[0], l, mask_of(take<u32>(w, i.o[1], l), take<u32>(w, i.o[2], l), kClamp));
  });
}
template <class T, bool kClamp>
void szext(Warp& w, const Instruction& i) {
  each(w.mask, [&](int l) {
    put(w, i.o[0], l, widened(extended(take<T>(w, i.o[1], l), take<u32>(w, i.o[2], l), kClamp)));
  });
}
void fns(Warp& w, const Instruction& i) {
  each(w.mask, [&](int l) {
    put(w, i.o[0], l,
        nth_set(take<u32>(w, i.o[1], l), take<u32>(w, i.o[2], l), take<s32>(w, i.o[3], l)));
  });
}

// --- prmt: a selector names, for each byte of the result, a byte of {b, a} and maybe its sign only

u32 permuted(u64 both, u32 selector) {
  u32 r = 0;
  for (int b = 0; b < 4; ++b) {
    const u32 s = selector >> (4 * b) & 15;
    u32 byte = u32(both >> (8 * (s & 7))) & 255;
    if (s & 8) byte = byte & 128 ? 255 : 0;
    r |= byte << (8 * b);
  }
  return r;
}
// The selectors of the modes f4e, b4e, rc8, ecl, ecr and rc16, by the low two bits of c.
constexpr u16 kSelectors[6][4] = {
    {0x3210, 0x4321, 0x5432, 0x6543}, {0x5670, 0x6701, 0x7012, 0x0123},
    {0x0000, 0x1111, 0x2222, 0x3333}, {0x3210, 0x3211, 0x3222, 0x3333},
    {0x0000, 0x1110, 0x2210, 0x3210}, {0x1010, 0x3232, 0x1010, 0x3232}};
constexpr int kGeneric = -1;
template <int kMode>
void prmt(Warp& w, const Instruction& i) {
  each(w.mask, [&](int l) {
    const u64 both = take<u32>(w, i.o[1], l) | u64(take<u32>(w, i.o[2], l)) << 32;
    const u32 c = take<u32>(w, i.o[3], l);
    put(w, i.o[0], l,
        permuted(both, kMode == kGeneric ? c : kSelectors[std::max(kMode, 0)][c & 3]));
  });
}

// mode: 0 for a result, or 1 + the logic of the predicate that it gives too.
void lop3(Warp& w, const Instruction& i) {
  const Operand* in = &i.o[i.outputs];
  Mask any = 0;
  each(w.mask, [&](int l) {
    const u32 a = take<u32>(w, in[0], l), b = take<u32>(w, in[1], l), c = take<u32>(w, in[2], l);
    const u32 table = take<u32>(w, in[3], l);
    u32 r = 0;
    for (int k = 0; k < 8; ++k)
      if (table >> k & 1) r |= (k & 4 ? a : ~a) & (k & 2 ? b : ~b) & (k & 1 ? c : ~c);
    put(w, i.o[0], l, r);
    any |= Mask(r != 0) << l;
  });
  if (i.outputs == 1) return;
  const Mask q = w.predicate(in[4]);
  w.set_predicate(i.o[1], i.mode == kAnd ? any & q : i.mode == kOr ? any | q : any ^ q);
}

template <bool kLeft, bool kWrap>
void shf(Warp& w, const Instruction& i) {
  each(w.mask, [&](int l) {
    const u64 both = take<u32>(w, i.o[1], l) | u64(take<u32>(w, i.o[2], l)) << 32;
    const u32 c = take<u32>(w, i.o[3], l), n = kWrap ? c & 31 : std::min(c, 32u);
    put(w, i.o[0], l, kLeft ? u32(both << n >> 32) : u32(both >> n));
  });
}

Handler logic(const Opcode& op) {
  const std::string& name = op.name();
  const std::string_view t = op.type();
  const bool predicate = t == "pred";
  if (name == "and")
    return predicate ? &predicates<kAnd> : PTX_FOR(PTX_BITS, t, &binary<And, T, T, T>);
  if (name == "or")
    return predicate ? &predicates<kOr> : PTX_FOR(PTX_BITS, t, &binary<Or, T, T, T>);
  if (name == "xor")
    return predicate ? &predicates<kXor> : PTX_FOR(PTX_BITS, t, &binary<Xor, T, T, T>);
  if (name == "not") return predicate ? &predicates<kNot> : PTX_FOR(PTX_BITS, t, &unary<Not, T, T>);
  if (name == "cnot") return PTX_FOR(PTX_BITS, t, &unary<Cnot, T, T>);
  if (name == "shl") return PTX_FOR(PTX_BITS, t, &binary<Shl, T, T, u32>);
  if (name == "shr") return PTX_FOR(PTX_INTEGERS, t, &binary<Shr, T, T, u32>);
  return nullptr;
}

Handler counts(const Opcode& op) {
  const std::string& name = op.name();
  const std::string_view t = op.type();
  if (name == "popc") return PTX_FOR(PTX_TYPES(u32, u64), t, &unary<Popc, u32, T>);
  if (name == "brev") return PTX_FOR(PTX_TYPES(u32, u64), t, &unary<Brev, T, T>);
  if (name == "clz") return PTX_FOR(PTX_TYPES(u32, u64), t, &unary<Clz, u32, T>);
  if (name == "bfind") {
    if (op.has("shiftamt"))
      return PTX_FOR(PTX_TYPES(u32, s32, u64, s64), t, &unary<BfindShift, u32, T>);
    return PTX_FOR(PTX_TYPES(u32, s32, u64, s64), t, &unary<Bfind, u32, T>);
  }
  return nullptr;
}

Handler fields(const Opcode& op, Instruction& i) {
  const std::string& name = op.name();
  if (name == "prmt") {
    op.has("b32");
    const std::string_view mode = op.one_of({"f4e", "b4e", "rc8", "ecl", "ecr", "rc16"});
    return mode == "f4e"    ? &prmt<0>
           : mode == "b4e"  ? &prmt<1>
           : mode == "rc8"  ? &prmt<2>
           : mode == "ecl"  ? &prmt<3>
           : mode == "ecr"  ? &prmt<4>
           : mode == "rc16" ? &prmt<5>
                            : &prmt<kGeneric>;
  }
  const std::string_view t = op.type();
  if (name == "bfe") return PTX_FOR(PTX_TYPES(u32, s32, u64, s64), t, &bfe<T>);
  if (name == "bfi") return PTX_FOR(PTX_TYPES(u32, u64), t, &bfi<T>);
  if (name == "fns") return t == "b32" ? &fns : nullptr;
  if (name == "lop3" && t == "b32") {
    const std::string_view logic = op.one_of({"and", "or", "xor"});
    i.outputs = logic.empty() ? 1 : 2;
    i.mode = logic == "and" ? kAnd : logic == "or" ? kOr : kXor;
    return &lop3;
  }
  const bool wrap = op.one_of({"wrap", "clamp"}) == "wrap";
  if (name == "bmsk") return wrap ? &bmsk<false> : &bmsk<true>;
  if (name == "szext") {
    if (t == "u32") return wrap ? &szext<u32, false> : &szext<u32, true>;
    if (t == "s32") return wrap ? &szext<s32, false> : &szext<s32, true>;
  }
  if (name == "shf" && t == "b32") {
    if (op.one_of({"l", "r"}) == "l") return wrap ? &shf<true, true> : &shf<true, false>;
    return wrap ? &shf<false, true> : &shf<false, false>;
  }
  return nullptr;
}

}  // namespace

Handler bits(const Opcode& op, Instruction& i) {
  if (const Handler h = logic(op)) return h;
  if (const Handler h = counts(op)) return h;
  return fields(op, i);
}

}  // namespace ptx
