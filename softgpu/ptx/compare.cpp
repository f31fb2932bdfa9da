// SPDX-License-Identifier: Apache-2.0
// Comparisons, and choices by them.
#include <cmath>

#include "ptx/lanes.h"
#include "ptx/numbers.h"
#include "ptx/opcode.h"

namespace ptx {
namespace {

#define PTX_COMPARE(Name, ...) \
  struct Name {                \
    template <class T>         \
    static bool f(T a, T b) {  \
      return __VA_ARGS__;      \
    }                          \
  }
PTX_COMPARE(Eq, a == b);
PTX_COMPARE(Ne, a<b || a> b);
PTX_COMPARE(Lt, a < b);
PTX_COMPARE(Le, a <= b);
PTX_COMPARE(Gt, a > b);
PTX_COMPARE(Ge, a >= b);
PTX_COMPARE(Equ, !(a < b || a > b));
PTX_COMPARE(Neu, !(a == b));
PTX_COMPARE(Ltu, !(a >= b));
PTX_COMPARE(Leu, !(a > b));
PTX_COMPARE(Gtu, !(a <= b));
PTX_COMPARE(Geu, !(a < b));
PTX_COMPARE(Num, a == a && b == b);
PTX_COMPARE(Nan, a != a || b != b);

enum Combine : u32 { kNone, kAnd, kOr, kXor };

Mask combined(Warp& w, const Instruction& i, Mask r, size_t with) {
  if (i.o.size() <= with) return r;
  const Mask c = w.predicate(i.o[with]);
  return i.mode == kAnd ? r & c : i.mode == kOr ? r | c : r ^ c;
}

// Lanes of registers as numbers: the halves are widened, `part` is which of a pair.
template <class T>
struct Plain {
  using Value = T;
  static T get(Warp& w, const Operand& o, int l, int) { return w.at<T>(o)[l]; }
};
template <float (*kWiden)(u16)>
struct Halves {
  using Value = float;
  static float get(Warp& w, const Operand& o, int l, int part) {
    return kWiden(u16(w.lane_value(o, l) >> (16 * part)));
  }
};

template <class Source, class C>
Mask holds(Warp& w, const Operand& a, const Operand& b, int part) {
  Mask r = 0;
  for (int l = 0; l < kLanes; ++l)
    r |= Mask(C::f(Source::get(w, a, l, part), Source::get(w, b, l, part))) << l;
  return r;
}

// setp: p, or p|q where q is of the complement, or of the upper half of a pair.
template <class Source, class C>
void setp(Warp& w, const Instruction& i) {
  const size_t a = i.outputs;
  const Mask low = holds<Source, C>(w, i.o[a], i.o[a + 1], 0);
  const Mask other = i.count == 2 ? holds<Source, C>(w, i.o[a], i.o[a + 1], 1) : ~low;
  w.set_predicate(i.o[0], combined(w, i, low, a + 2));
  if (i.outputs == 2) w.set_predicate(i.o[1], combined(w, i, other, a + 2));
}

// set: all ones or 1.0, the bits of which are in `offset`.
template <class Source, class C>
void set(Warp& w, const Instruction& i) {
  const Mask low = combined(w, i, holds<Source, C>(w, i.o[1], i.o[2], 0), 3);
  const Mask high = i.count == 2 ? combined(w, i, holds<Source, C>(w, i.o[1], i.o[2], 1), 3) : 0;
  const u32 one = u32(i.offset);
  each(w.mask, [&](int l) {
    put(w, i.o[0], l, (low >> l & 1 ? one : 0) | (high >> l & 1 ? one << 16 : 0));
  });
}

template <class T>
void selp(Warp& w, const Instruction& i) {
  T* d = w.at<T>(i.o[0]);
  const T *a = w.at<T>(i.o[1]), *b = w.at<T>(i.o[2]);
  const Mask p = w.predicate(i.o[3]);
  for (int l = 0; l < kLanes; ++l)
    if (w.mask >> l & 1) d[l] = p >> l & 1 ? a[l] : b[l];
}
template <class T, class C>
void slct(Warp& w, const Instruction& i) {
  each(w.mask, [&](int l) {
    w.at<T>(i.o[0])[l] = w.at<C>(i.o[3])[l] >= 0 ? w.at<T>(i.o[1])[l] : w.at<T>(i.o[2])[l];
  });
}

enum Kind : u32 { kFinite, kInfinite, kNumber, kNotANumber, kNormal, kSubnormal };
template <class T>
bool is_kind(T x, u32 kind) {
  switch (kind) {
    case kFinite:
      return std::isfinite(x);
    case kInfinite:
      return std::isinf(x);
    case kNumber:
      return !std::isnan(x);
    case kNotANumber:
      return std::isnan(x);
    case kNormal:
      return std::isnormal(x);
    default:
      return std::fpclassify(x) == FP_SUBNORMAL;
  }
}
template <class T>
void testp(Warp& w, const Instruction& i) {
  Mask r = 0;
  each(w.mask, [&](int l) { r |= Mask(is_kind(w.at<T>(i.o[1])[l], i.mode)) << l; });
  w.set_predicate(i.o[0], r);
}
Handler testp_of(const Opcode& op, Instruction& i) {
  const char* const names[] = {"finite", "infinite", "number", "notanumber", "normal", "subnormal"};
  for (u32 kind = 0; kind < std::size(names); ++kind)
    if (op.has(names[kind])) i.mode = kind;
  return PTX_FOR(PTX_FLOATS, op.type(), &testp<T>);
}

template <class Source, class C>
Handler setter(bool p) {
  return p ? Handler(&setp<Source, C>) : Handler(&set<Source, C>);
}
template <class C>
Handler of_source(std::string_view t, bool p) {
  if (t == "f16" || t == "f16x2") return setter<Halves<of_f16>, C>(p);
  if (t == "bf16" || t == "bf16x2") return setter<Halves<of_bf16>, C>(p);
  return of<PTX_INTEGERS, PTX_FLOATS>(t, [p]<class T>() { return setter<Plain<T>, C>(p); });
}
Handler with_comparison(const Opcode& op, std::string_view t, bool p) {
  const std::string_view c = op.one_of({"eq", "ne", "lt", "lo", "le", "ls", "gt", "hi", "ge", "hs",
                                        "equ", "neu", "ltu", "leu", "gtu", "geu", "num", "nan"});
  if (c == "eq") return of_source<Eq>(t, p);
  if (c == "ne") return of_source<Ne>(t, p);
  if (c == "lt" || c == "lo") return of_source<Lt>(t, p);
  if (c == "le" || c == "ls") return of_source<Le>(t, p);
  if (c == "gt" || c == "hi") return of_source<Gt>(t, p);
  if (c == "ge" || c == "hs") return of_source<Ge>(t, p);
  if (c == "equ") return of_source<Equ>(t, p);
  if (c == "neu") return of_source<Neu>(t, p);
  if (c == "ltu") return of_source<Ltu>(t, p);
  if (c == "leu") return of_source<Leu>(t, p);
  if (c == "gtu") return of_source<Gtu>(t, p);
  if (c == "geu") return of_source<Geu>(t, p);
  if (c == "num") return of_source<Num>(t, p);
  if (c == "nan") return of_source<Nan>(t, p);
  return nullptr;
}

// The bits of "true" in a type.
int64_t true_of(std::string_view t) {
  if (t == "f32") return 0x3f800000;
  if (t.starts_with("f16")) return 0x3c00;
  if (t.starts_with("bf16")) return 0x3f80;
  return t == "u16" || t == "s16" ? 0xffff : 0xffffffff;
}

}  // namespace

Handler comparison(const Opcode& op, Instruction& i) {
  const std::string& name = op.name();
  const std::string_view t = op.type();
  if (name == "selp") return PTX_FOR(PTX_TYPES(PTX_INTEGERS, PTX_FLOATS), t, &selp<T>);
  if (name == "slct") {
    const std::string_view value = op.type(1);
    op.has("ftz");  // -0 and subnormals are not less than 0 but for negative ones
    if (t == "s32") return PTX_FOR(PTX_TYPES(PTX_INTEGERS, PTX_FLOATS), value, &slct<T, s32>);
    if (t == "f32") return PTX_FOR(PTX_TYPES(PTX_INTEGERS, PTX_FLOATS), value, &slct<T, float>);
    return nullptr;
  }
  if (name == "testp") return testp_of(op, i);
  const bool p = name == "setp";
  const Handler h = with_comparison(op, t, p);
  const std::string_view logic = op.one_of({"and", "or", "xor"});
  i.count = t.ends_with("x2") ? 2 : 1;
  if (p) {
    i.outputs = i.o.size() > 1 && i.o[1].size == 0 ? 2 : 1;
  } else {
    const std::string_view to = op.type(1);
    i.offset = true_of(to);
    // A pair gives a pair, or one word whose halves are both all ones.
    if (i.count == 2 && !to.ends_with("x2")) i.offset = 0xffff;
  }
  const Handler result = with_modes(op, i, h);
  i.mode = logic == "and" ? kAnd : logic == "or" ? kOr : logic == "xor" ? kXor : kNone;
  return result;
}

}  // namespace ptx
