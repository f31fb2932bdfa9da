// SPDX-License-Identifier: Apache-2.0
// What each opcode does to the lanes of a warp.
#include <immintrin.h>

#include <cmath>
#include <cstring>
#include <sstream>
#include <type_traits>

#include "ptx/ptx.h"

namespace ptx {
namespace {

using u8 = uint8_t;
using u16 = uint16_t;
using u32 = uint32_t;
using u64 = uint64_t;
using s8 = int8_t;
using s16 = int16_t;
using s32 = int32_t;
using s64 = int64_t;

template <class F>
inline void each(Mask m, F f) {
  for (; m; m &= m - 1) f(__builtin_ctz(m));
}

// --- lane by lane, all operands of one type (results R)

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

#define BINARY(Name, expression)         \
  struct Name {                          \
    template <class R, class A, class B> \
    static R f(A a, B b) {               \
      return R(expression);              \
    }                                    \
  }
#define UNARY(Name, expression) \
  struct Name {                 \
    template <class R, class A> \
    static R f(A a) {           \
      return R(expression);     \
    }                           \
  }
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
template <class T>
T remainder_of(T a, T b) {
  if (b == 0) throw Error("division by zero");
  if constexpr (std::is_signed_v<T>) {
    if (b == -1) return 0;
  }
  return a % b;
}
template <class T>
T greater(T a, T b) {
  if constexpr (std::is_floating_point_v<T>) {
    if (a != a) return b != b ? T(NAN) : b;
    if (a == b) return std::signbit(a) ? b : a;
    return b != b || a > b ? a : b;
  } else {
    return a > b ? a : b;
  }
}
template <class T>
T lesser(T a, T b) {
  if constexpr (std::is_floating_point_v<T>) {
    if (a != a) return b != b ? T(NAN) : b;
    if (a == b) return std::signbit(a) ? a : b;
    return b != b || a < b ? a : b;
  } else {
    return a < b ? a : b;
  }
}
BINARY(Add, a + b);
BINARY(Sub, a - b);
BINARY(Mul, R(a) * R(b));
BINARY(MulHigh, (__int128(a) * __int128(b)) >> (8 * sizeof(R)));
BINARY(Div, divide<A>(a, b));
BINARY(Rem, remainder_of<A>(a, b));
BINARY(Max, greater<A>(a, b));
BINARY(Min, lesser<A>(a, b));
BINARY(And, a& b);
BINARY(Or, a | b);
BINARY(Xor, a ^ b);
BINARY(Shl, b >= 8 * sizeof(A) ? A(0) : A(a << b));
BINARY(Shr, b >= 8 * sizeof(A) ? A(a < 0 ? -1 : 0) : A(a >> b));
UNARY(Move, a);
UNARY(Neg, -a);
UNARY(Not, ~a);
UNARY(Abs, std::abs(a));
UNARY(Sqrt, std::sqrt(a));
UNARY(Rcp, A(1) / a);
UNARY(Rsqrt, A(1) / std::sqrt(a));
UNARY(Ex2, std::exp2(a));
UNARY(Ex2Ftz, std::fpclassify(std::exp2(a)) == FP_SUBNORMAL ? A(0) : std::exp2(a));
UNARY(Lg2, std::log2(a));
UNARY(Tanh, std::tanh(a));
UNARY(Sin, std::sin(a));
UNARY(Cos, std::cos(a));
UNARY(Popc, __builtin_popcountll(a));
UNARY(Brev, [&] {
  u64 r = 0;
  for (size_t b = 0; b < 8 * sizeof(A); ++b) r |= u64(a >> b & 1) << (8 * sizeof(A) - 1 - b);
  return r;
}());
UNARY(Clz, a ? __builtin_clzll(u64(a)) - (64 - 8 * int(sizeof(A))) : 8 * int(sizeof(A)));
UNARY(Bfind, a ? 63 - __builtin_clzll(u64(a)) : -1);
UNARY(BfindShift, a ? __builtin_clzll(u64(a)) - (64 - 8 * int(sizeof(A))) : -1);
UNARY(Saturate, a > 0 ? (a < 1 ? a : A(1)) : A(0));
struct Fma {
  template <class R, class A>
  static R f(A a, A b, R c) {
    return std::fma(a, b, c);
  }
};
struct Mad {
  template <class R, class A>
  static R f(A a, A b, R c) {
    return R(a) * R(b) + c;
  }
};

// Another direction of rounding; the calls are opaque, so that no arithmetic leaves the bracket.
template <class Op, unsigned kMode>
void rounded(Warp& w, const Instruction& i) {
  static const volatile Handler inner = &ternary<Op, float, float>;
  const unsigned old = _mm_getcsr();
  _mm_setcsr((old & ~0x6000u) | kMode);
  inner(w, i);
  _mm_setcsr(old);
}

// --- predicates

template <class T, class C>
void compare(Warp& w, const Instruction& i) {
  const T* a = w.at<T>(i.o[i.outputs]);
  const T* b = w.at<T>(i.o[i.outputs + 1]);
  Mask r = 0;
  for (int l = 0; l < kLanes; ++l) r |= Mask(C::f(a[l], b[l])) << l;
  Mask other = ~r;
  if (i.o.size() > size_t(i.outputs) + 2) {
    const Mask c = w.predicate(i.o[i.outputs + 2]);
    if (i.count == 1) r &= c, other &= c;
    if (i.count == 2) r |= c, other |= c;
    if (i.count == 3) r ^= c, other ^= c;
  }
  Mask* d = w.at<Mask>(i.o[0]);
  *d = (*d & ~w.mask) | (r & w.mask);
  if (i.outputs == 2) {
    Mask* e = w.at<Mask>(i.o[1]);
    *e = (*e & ~w.mask) | (other & w.mask);
  }
}
#define COMPARE(Name, expression) \
  struct Name {                   \
    template <class T>            \
    static bool f(T a, T b) {     \
      return expression;          \
    }                             \
  }
COMPARE(Eq, a == b);
COMPARE(Ne, a<b || a> b);
COMPARE(Lt, a < b);
COMPARE(Le, a <= b);
COMPARE(Gt, a > b);
COMPARE(Ge, a >= b);
COMPARE(Equ, !(a < b || a > b));
COMPARE(Neu, !(a == b));
COMPARE(Ltu, !(a >= b));
COMPARE(Leu, !(a > b));
COMPARE(Gtu, !(a <= b));
COMPARE(Geu, !(a < b));
COMPARE(Num, a == a && b == b);
COMPARE(Nan, a != a || b != b);

template <int kOp>
void predicates(Warp& w, const Instruction& i) {
  const Mask a = w.predicate(i.o[1]), b = i.o.size() > 2 ? w.predicate(i.o[2]) : 0;
  const Mask r = kOp == 0 ? a & b : kOp == 1 ? a | b : kOp == 2 ? a ^ b : kOp == 3 ? ~a : a;
  Mask* d = w.at<Mask>(i.o[0]);
  *d = (*d & ~w.mask) | (r & w.mask);
}

template <class T>
void selp(Warp& w, const Instruction& i) {
  T* d = w.at<T>(i.o[0]);
  const T* a = w.at<T>(i.o[1]);
  const T* b = w.at<T>(i.o[2]);
  const Mask p = w.predicate(i.o[3]);
  for (int l = 0; l < kLanes; ++l)
    if (w.mask >> l & 1) d[l] = p >> l & 1 ? a[l] : b[l];
}

// --- conversions: the type may be narrower than the register

template <class T>
u64 widened(T v) {
  u64 bits = 0;
  if constexpr (std::is_integral_v<T>) return u64(s64(v));
  memcpy(&bits, &v, sizeof v);
  return bits;
}
void put(Warp& w, const Operand& o, int lane, u64 bits) {
  if (o.size == 4)
    w.at<u32>(o)[lane] = u32(bits);
  else if (o.size == 8)
    w.at<u64>(o)[lane] = bits;
  else
    w.at<u16>(o)[lane] = u16(bits);
}
template <class T>
T take(Warp& w, const Operand& o, int lane) {
  T v;
  memcpy(&v, w.file + o.at + lane * o.size, sizeof v);
  return v;
}

template <class D, class S, int kRound>  // kRound: 0 none or nearest, 1 zero, 2 down, 3 up
void convert(Warp& w, const Instruction& i) {
  each(w.mask, [&](int l) {
    const S s = take<S>(w, i.o[1], l);
    D d;
    if constexpr (std::is_floating_point_v<S> && std::is_integral_v<D>) {
      const double x = kRound == 1   ? trunc(double(s))
                       : kRound == 2 ? floor(double(s))
                       : kRound == 3 ? ceil(double(s))
                                     : nearbyint(double(s));
      const double low = double(std::numeric_limits<D>::min());
      const double high = double(std::numeric_limits<D>::max());
      d = x != x      ? D(0)
          : x <= low  ? std::numeric_limits<D>::min()
          : x >= high ? std::numeric_limits<D>::max()
                      : D(x);
    } else if constexpr (std::is_floating_point_v<S> && std::is_same_v<S, D> && kRound) {
      d = kRound == 1 ? std::trunc(s) : kRound == 2 ? std::floor(s) : std::ceil(s);
    } else {
      d = D(s);
    }
    put(w, i.o[0], l, widened(d));
  });
}
u16 bf16_of(float f) {
  if (f != f) return 0x7fff;
  u32 b;
  memcpy(&b, &f, 4);
  return u16((b + 0x7fff + (b >> 16 & 1)) >> 16);
}
float of_bf16(u16 h) {
  const u32 b = u32(h) << 16;
  float f;
  memcpy(&f, &b, 4);
  return f;
}
u16 f16_of(float f) { return f != f ? 0x7fff : _cvtss_sh(f, 0); }
float of_f16(u16 h) { return _cvtsh_ss(h); }

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

// --- moves between a register and the parts of a vector

void pack(Warp& w, const Instruction& i) {
  const int n = int(i.o.size()) - 1, bits = 8 * i.o[0].size / n;
  each(w.mask, [&](int l) {
    u64 r = 0;
    for (int p = 0; p < n; ++p) r |= w.lane_value(i.o[1 + p], l) << (bits * p);
    put(w, i.o[0], l, r);
  });
}
void unpack(Warp& w, const Instruction& i) {
  if (i.o[0].size == 4) {  // of 64 bits
    each(w.mask, [&](int l) {
      const u64 v = w.at<u64>(i.o[2])[l];
      w.at<u32>(i.o[0])[l] = u32(v);
      w.at<u32>(i.o[1])[l] = u32(v >> 32);
    });
    return;
  }
  const int n = int(i.o.size()) - 1, bits = 8 * i.o[n].size / n;
  each(w.mask, [&](int l) {
    const u64 v = w.lane_value(i.o[n], l);
    for (int p = 0; p < n; ++p) put(w, i.o[p], l, v >> (bits * p));
  });
}

void bfi(Warp& w, const Instruction& i) {
  each(w.mask, [&](int l) {
    const u64 pos = take<u32>(w, i.o[3], l) & 255, len = take<u32>(w, i.o[4], l) & 255;
    const u64 ones = len >= 64 ? ~0ull : (1ull << len) - 1;
    const u64 mask = pos >= 64 ? 0 : ones << pos;
    const u64 a = w.lane_value(i.o[1], l), b = w.lane_value(i.o[2], l);
    put(w, i.o[0], l, (b & ~mask) | (pos >= 64 ? 0 : a << pos & mask));
  });
}
template <class T>
void bfe(Warp& w, const Instruction& i) {
  each(w.mask, [&](int l) {
    const int bits = 8 * sizeof(T), pos = take<u32>(w, i.o[2], l) & 255;
    const int len = take<u32>(w, i.o[3], l) & 255;
    const T a = take<T>(w, i.o[1], l);
    const int top = std::min(pos + len - 1, bits - 1);
    const bool sign = std::is_signed_v<T> && len && (a >> top & 1);
    u64 r = sign ? ~0ull : 0;
    for (int b = 0; b < len && b < bits; ++b) {
      const bool bit = pos + b < bits ? bool(a >> (pos + b) & 1) : sign;
      r = (r & ~(1ull << b)) | u64(bit) << b;
    }
    put(w, i.o[0], l, r);
  });
}
void prmt(Warp& w, const Instruction& i) {
  each(w.mask, [&](int l) {
    const u64 both = take<u32>(w, i.o[1], l) | u64(take<u32>(w, i.o[2], l)) << 32;
    const u32 c = take<u32>(w, i.o[3], l);
    u32 r = 0;
    for (int b = 0; b < 4; ++b) {
      const u32 s = c >> (4 * b) & 15;
      u32 byte = u32(both >> (8 * (s & 7))) & 255;
      if (s & 8) byte = byte & 128 ? 255 : 0;
      r |= byte << (8 * b);
    }
    put(w, i.o[0], l, r);
  });
}
void lop3(Warp& w, const Instruction& i) {
  each(w.mask, [&](int l) {
    const u32 a = take<u32>(w, i.o[1], l), b = take<u32>(w, i.o[2], l), c = take<u32>(w, i.o[3], l);
    const u32 t = take<u32>(w, i.o[4], l);
    u32 r = 0;
    for (int k = 0; k < 8; ++k)
      if (t >> k & 1) r |= (k & 4 ? a : ~a) & (k & 2 ? b : ~b) & (k & 1 ? c : ~c);
    put(w, i.o[0], l, r);
  });
}
template <bool kLeft>
void shf(Warp& w, const Instruction& i) {  // .wrap or .clamp by count
  each(w.mask, [&](int l) {
    const u64 both = take<u32>(w, i.o[1], l) | u64(take<u32>(w, i.o[2], l)) << 32;
    u32 n = take<u32>(w, i.o[3], l);
    n = i.count == 1 ? n & 31 : std::min(n, 32u);
    put(w, i.o[0], l, kLeft ? u32(both << n >> 32) : u32(both >> n));
  });
}

// --- memory

[[noreturn, gnu::noinline, gnu::cold]] void misaligned(u64 address, int lane, size_t bytes) {
  std::ostringstream s;
  s << "lane " << lane << ": address 0x" << std::hex << address << " is not a multiple of "
    << std::dec << bytes;
  throw Error(s.str());
}
inline char* pointer(Warp& w, const Instruction& i, const Operand& o, int lane, size_t bytes) {
  const u64 base = w.lane_value(o, lane) + u64(i.offset);
  char* p;
  if (i.space == Space::shared) {
    p = w.shared(u32(base), bytes);
  } else if (i.space == Space::local) {
    if (base + bytes > w.kernel->local) throw Error("local memory: offset " + std::to_string(base));
    p = reinterpret_cast<char*>(&w.local[lane * w.kernel->local + base]);
  } else {
    p = reinterpret_cast<char*>(base);
  }
  const u64 a = i.space == Space::shared || i.space == Space::local ? u32(base) : base;
  if (a & (bytes - 1)) misaligned(a, lane, bytes);
  return p;
}
template <class T>
void load(Warp& w, const Instruction& i) {
  const Operand address = i.o[i.count];
  each(w.mask, [&](int l) {
    const char* p = pointer(w, i, address, l, sizeof(T) * i.count);
    if (i.space != Space::local && i.space != Space::param)
      w.touch(l, p, sizeof(T) * i.count, i.nc ? Access::nc : Access::read);
    T v[8];
    memcpy(v, p, sizeof(T) * i.count);
    for (int n = 0; n < i.count; ++n) put(w, i.o[n], l, widened(v[n]));
  });
}
template <class T>
void store(Warp& w, const Instruction& i) {
  each(w.mask, [&](int l) {
    char* p = pointer(w, i, i.o[0], l, sizeof(T) * i.count);
    if (i.space != Space::local) w.touch(l, p, sizeof(T) * i.count, Access::write);
    T v[8];
    for (int n = 0; n < i.count; ++n) v[n] = T(w.lane_value(i.o[1 + n], l));
    memcpy(p, v, sizeof(T) * i.count);
  });
}
// The integer that holds a T.
template <class T>
using Word = std::conditional_t<std::is_same_v<T, float>, u32,
                                std::conditional_t<std::is_same_v<T, double>, u64, T>>;
template <class Op, class T>
void atomic(Warp& w, const Instruction& i) {
  each(w.mask, [&](int l) {
    char* p = pointer(w, i, i.o[i.outputs], l, sizeof(T));
    w.touch(l, p, sizeof(T), Access::atomic);
    T old;
    memcpy(&old, p, sizeof old);
    const T next = Op::template f<T>(old, take<T>(w, i.o[i.outputs + 1], l));
    memcpy(p, &next, sizeof next);
    if (i.outputs) put(w, i.o[0], l, widened(old));
  });
}
BINARY(Exchange, ((void)a, b));

template <bool kToShared>
void cvta_shared(Warp& w, const Instruction& i) {
  const u64 base = reinterpret_cast<u64>(w.block->shared_base);
  each(w.mask, [&](int l) {
    const u64 v = w.lane_value(i.o[1], l);
    put(w, i.o[0], l, kToShared ? v - base : v + base);
  });
}
void cvta_local(Warp& w, const Instruction& i) {
  each(w.mask, [&](int l) {
    put(w, i.o[0], l,
        w.lane_value(i.o[1], l) + reinterpret_cast<u64>(&w.local[l * w.kernel->local]));
  });
}

// --- collectives; the warp's loop has seen that all members are here

void shfl(Warp& w, const Instruction& i, int kind) {
  const bool flag = i.outputs == 2;
  const Operand* o = &i.o[flag ? 1 : 0];
  u32 r[kLanes];
  Mask valid = 0;
  each(w.mask, [&](int l) {
    const int b = take<u32>(w, o[2], l) & 31, c = int(take<u32>(w, o[3], l));
    const int clamp = c & 31, segment = c >> 8 & 31;
    const int last = (l & segment) | (clamp & ~segment), first = l & segment;
    int j = kind == 0 ? l - b : kind == 1 ? l + b : kind == 2 ? l ^ b : first | (b & ~segment);
    const bool ok = kind == 0 ? j >= last : j <= last;
    if (!ok) j = l;
    valid |= Mask(ok) << l;
    // What a lane that takes no part would send is not defined.
    r[l] = w.mask >> j & 1 ? take<u32>(w, o[1], j) : 0xdeadbeef;
  });
  each(w.mask, [&](int l) { put(w, i.o[0], l, r[l]); });
  if (flag) {
    Mask* p = w.at<Mask>(i.o[1]);
    *p = (*p & ~w.mask) | valid;
  }
}
template <int kKind>
void shuffle(Warp& w, const Instruction& i) {
  shfl(w, i, kKind);
}
template <int kKind>
void vote(Warp& w, const Instruction& i) {  // any, all, uni, ballot
  const Mask a = w.predicate(i.o[1]) & w.mask;
  if (kKind == 3) return each(w.mask, [&](int l) { put(w, i.o[0], l, a); });
  const bool r = kKind == 0 ? a : kKind == 1 ? a == w.mask : a == 0 || a == w.mask;
  Mask* d = w.at<Mask>(i.o[0]);
  *d = (*d & ~w.mask) | (r ? w.mask : 0);
}
void match_any(Warp& w, const Instruction& i) {
  Mask r[kLanes];
  each(w.mask, [&](int l) {
    r[l] = 0;
    each(w.mask,
         [&](int m) { r[l] |= Mask(w.lane_value(i.o[1], l) == w.lane_value(i.o[1], m)) << m; });
  });
  each(w.mask, [&](int l) { put(w, i.o[0], l, r[l]); });
}
template <class Op, class T>
void redux(Warp& w, const Instruction& i) {
  bool first = true;
  T r{};
  each(w.mask, [&](int l) {
    const T v = take<T>(w, i.o[1], l);
    r = first ? v : Op::template f<T>(r, v);
    first = false;
  });
  each(w.mask, [&](int l) { put(w, i.o[0], l, widened(r)); });
}
void activemask(Warp& w, const Instruction& i) {
  each(w.mask, [&](int l) { put(w, i.o[0], l, w.mask); });
}
void nothing(Warp&, const Instruction&) {}
void warp_barrier(Warp& w, const Instruction&) { ++w.epoch; }

void need_all_lanes(const Warp& w) {
  if (w.mask != ~0u) throw Error("not all 32 lanes are here");
}

template <bool kTranspose>
void ldmatrix(Warp& w, const Instruction& i) {
  need_all_lanes(w);
  const Operand& address = i.o[i.count];
  u32 r[4][kLanes];
  for (int j = 0; j < i.count; ++j) {
    u16 m[8][8];
    for (int row = 0; row < 8; ++row) {
      const char* p = pointer(w, i, address, 8 * j + row, 16);
      w.touch(8 * j + row, p, 16, Access::read);
      memcpy(m[row], p, 16);
    }
    for (int l = 0; l < kLanes; ++l) {
      const int g = l / 4, c = 2 * (l % 4);
      r[j][l] = kTranspose ? m[c][g] | u32(m[c + 1][g]) << 16 : m[g][c] | u32(m[g][c + 1]) << 16;
    }
  }
  for (int j = 0; j < i.count; ++j) memcpy(w.at<u32>(i.o[j]), r[j], sizeof r[j]);
}

template <float (*kWiden)(u16), int kDepth>  // m16n8k16 or k8: D 4, A 4 or 2, B 2 or 1, C 4
void mma(Warp& w, const Instruction& i) {
  constexpr int kHalves = kDepth / 8;
  need_all_lanes(w);
  float a[16][kDepth], b[kDepth][8], d[16][8];
  for (int l = 0; l < kLanes; ++l) {
    const int g = l / 4, t = l % 4;
    for (int k = 0; k < kHalves; ++k) {
      const u32 top = w.at<u32>(i.o[4 + 2 * k])[l], low = w.at<u32>(i.o[5 + 2 * k])[l];
      const u32 right = w.at<u32>(i.o[4 + 2 * kHalves + k])[l];
      for (int h = 0; h < 2; ++h) {
        const int c = 8 * k + 2 * t + h;
        a[g][c] = kWiden(u16(top >> 16 * h));
        a[g + 8][c] = kWiden(u16(low >> 16 * h));
        b[c][g] = kWiden(u16(right >> 16 * h));
      }
    }
    for (int h = 0; h < 2; ++h) {
      d[g][2 * t + h] = w.at<float>(i.o[4 + 3 * kHalves + h])[l];
      d[g + 8][2 * t + h] = w.at<float>(i.o[6 + 3 * kHalves + h])[l];
    }
  }
  for (int m = 0; m < 16; ++m)
    for (int k = 0; k < kDepth; ++k)
      for (int n = 0; n < 8; ++n) d[m][n] += a[m][k] * b[k][n];
  for (int l = 0; l < kLanes; ++l) {
    const int g = l / 4, t = l % 4;
    for (int h = 0; h < 2; ++h) {
      w.at<float>(i.o[h])[l] = d[g][2 * t + h];
      w.at<float>(i.o[2 + h])[l] = d[g + 8][2 * t + h];
    }
  }
}

// --- asynchronous copies land as late as they may

void land(Warp& w, int l, size_t n) {
  for (size_t c = 0; c < n; ++c) {
    const Copy& y = w.copies[l][c];
    char* to = w.shared(y.to, y.bytes);
    w.touch(l, to, y.bytes, Access::write);
    if (y.read) w.touch(l, y.from, y.read, Access::read);
    memset(to, 0, y.bytes);
    memcpy(to, y.from, y.read);
  }
  w.copies[l].erase(w.copies[l].begin(), w.copies[l].begin() + long(n));
}
void cp_async(Warp& w, const Instruction& i) {
  each(w.mask, [&](int l) {
    const u32 bytes = take<u32>(w, i.o[2], l);
    const u32 read = i.o.size() > 3 ? take<u32>(w, i.o[3], l) : bytes;
    const u32 to = u32(w.lane_value(i.o[0], l) + u64(i.offset));
    const u64 from = w.lane_value(i.o[1], l);
    if (to % bytes || (read && from % bytes)) throw Error("cp.async: misaligned address");
    if (read > bytes) throw Error("cp.async: reads more than it writes");
    w.shared(to, bytes);
    w.copies[l].push_back({to, reinterpret_cast<const char*>(from), bytes, read});
    if (options.early) land(w, l, 1);
  });
}
void commit(Warp& w, const Instruction&) {
  each(w.mask, [&](int l) { w.groups[l].push_back(w.copies[l].size()); });
}
void wait_group(Warp& w, const Instruction& i) {
  const size_t keep = i.o.empty() ? 0 : take<u32>(w, i.o[0], 0);
  each(w.mask, [&](int l) {
    auto& groups = w.groups[l];
    const size_t ready = groups.size() > keep ? groups.size() - keep : 0;
    const size_t n = i.o.empty() ? w.copies[l].size() : ready ? groups[ready - 1] : 0;
    groups.erase(groups.begin(), groups.begin() + long(ready));
    for (size_t& g : groups) g -= n;
    land(w, l, n);
  });
}

// --- control

void bra(Warp& w, const Instruction& i) { w.branch(i.target, w.mask); }
void leave(Warp& w, const Instruction&) { w.leave(w.mask); }
void barrier(Warp& w, const Instruction& i) {
  w.barrier = i.o.empty() ? 0 : int(take<u32>(w, i.o[0], 0));
  w.expected = i.o.size() > 1 ? take<u32>(w, i.o[1], 0) : 0;
}

// --- the table

struct Opcode {
  std::vector<std::string> parts;
  explicit Opcode(const std::string& s) {
    std::string part;
    std::istringstream in(s);
    while (std::getline(in, part, '.')) parts.push_back(part);
  }
  const std::string& operator[](int i) const { return parts[i < 0 ? parts.size() + i : i]; }
  bool has(const char* p) const {
    for (const auto& q : parts)
      if (q == p) return true;
    return false;
  }
};

// f.operator()<T>() of the type named; null if none.
template <class... T, class F>
Handler of(const std::string& name, F f) {
  const auto name_of = []<class U>() -> std::string {
    const char kind = std::is_floating_point_v<U> ? 'f' : std::is_signed_v<U> ? 's' : 'u';
    return kind + std::to_string(8 * sizeof(U));
  };
  std::string n = name;
  if (n[0] == 'b') n[0] = 'u';
  Handler h = nullptr;
  ((n == name_of.template operator()<T>() ? void(h = f.template operator()<T>()) : void()), ...);
  return h;
}
#define TYPES(...) __VA_ARGS__
#define FOR(types, ...) of<types>(type, []<class T>() -> Handler { return __VA_ARGS__; })
#define INTEGERS u16, s16, u32, s32, u64, s64
#define BITS u16, u32, u64
#define FLOATS float, double

template <class C>
Handler comparison(const std::string& type) {
  return of<INTEGERS, FLOATS>(type, []<class T>() -> Handler { return &compare<T, C>; });
}

Handler setp(const Opcode& op, Instruction& i, const std::string& type) {
  i.outputs = i.o.size() > 1 && i.o[1].size == 0 ? 2 : 1;
  i.count = op.has("and") ? 1 : op.has("or") ? 2 : op.has("xor") ? 3 : 0;
  const std::string& c = op[1];
  if (c == "eq") return comparison<Eq>(type);
  if (c == "ne") return comparison<Ne>(type);
  if (c == "lt" || c == "lo") return comparison<Lt>(type);
  if (c == "le" || c == "ls") return comparison<Le>(type);
  if (c == "gt" || c == "hi") return comparison<Gt>(type);
  if (c == "ge" || c == "hs") return comparison<Ge>(type);
  if (c == "equ") return comparison<Equ>(type);
  if (c == "neu") return comparison<Neu>(type);
  if (c == "ltu") return comparison<Ltu>(type);
  if (c == "leu") return comparison<Leu>(type);
  if (c == "gtu") return comparison<Gtu>(type);
  if (c == "geu") return comparison<Geu>(type);
  if (c == "num") return comparison<Num>(type);
  if (c == "nan") return comparison<Nan>(type);
  return nullptr;
}

template <class D>
Handler cvt_to(const std::string& type, int round) {
  return of<u8, s8, INTEGERS, FLOATS>(type, [round]<class S>() -> Handler {
    return round == 1   ? &convert<D, S, 1>
           : round == 2 ? &convert<D, S, 2>
           : round == 3 ? &convert<D, S, 3>
                        : &convert<D, S, 0>;
  });
}
Handler cvt(const Opcode& op) {
  const std::string &to = op[-2], &from = op[-1];
  if (op.has("sat")) return to == "f32" && from == "f32" ? &unary<Saturate, float, float> : nullptr;
  if (from == "f32" && op.has("rn")) {
    if (to == "f16") return &narrow<f16_of, false>;
    if (to == "bf16") return &narrow<bf16_of, false>;
    if (to == "f16x2") return &narrow<f16_of, true>;
    if (to == "bf16x2") return &narrow<bf16_of, true>;
  }
  if (to == "f32" && from == "f16") return &widen<of_f16>;
  if (to == "f32" && from == "bf16") return &widen<of_bf16>;
  const int round = op.has("rzi") ? 1 : op.has("rmi") ? 2 : op.has("rpi") ? 3 : 0;
  return of<u8, s8, INTEGERS, FLOATS>(to,
                                      [&]<class D>() -> Handler { return cvt_to<D>(from, round); });
}

Handler reduction(const std::string& name, const std::string& type, bool is_redux) {
  const auto pick = [&]<class Op, class... T>() {
    return of<T...>(type, [&]<class U>() -> Handler {
      return is_redux ? Handler(&redux<Op, U>) : Handler(&atomic<Op, U>);
    });
  };
  if (name == "add") {
    return is_redux ? pick.operator()<Add, u32, s32>()
                    : pick.operator()<Add, u32, s32, u64, FLOATS>();
  }
  if (name == "max") return pick.operator()<Max, u32, s32, u64, s64>();
  if (name == "min") return pick.operator()<Min, u32, s32, u64, s64>();
  if (name == "and") return pick.operator()<And, u32, u64>();
  if (name == "or") return pick.operator()<Or, u32, u64>();
  if (name == "xor") return pick.operator()<Xor, u32, u64>();
  if (name == "exch" && !is_redux) return pick.operator()<Exchange, u32, u64>();
  return nullptr;
}

Handler find(const Opcode& op, Instruction& i) {
  const std::string &name = op[0], &type = op[-1];
  const bool predicate = type == "pred";
  if (name == "mov") {
    if (predicate) return &predicates<4>;
    if (i.o.size() > 2) return i.o[0].size > i.o[1].size ? &pack : &unpack;
    if (i.o[0].size != i.o[1].size) throw Error("a move between sizes");
    return FOR(TYPES(BITS, FLOATS, s16, s32, s64), &unary<Move, T, T>);
  }
  if (name == "add") return FOR(TYPES(INTEGERS, FLOATS), &binary<Add, T, T, T>);
  if (name == "sub") return FOR(TYPES(INTEGERS, FLOATS), &binary<Sub, T, T, T>);
  if (name == "mul") {
    if (op.has("wide")) {
      if (type == "u16") return &binary<Mul, u32, u16, u16>;
      if (type == "s16") return &binary<Mul, s32, s16, s16>;
      return type == "u32" ? &binary<Mul, u64, u32, u32> : &binary<Mul, s64, s32, s32>;
    }
    if (op.has("hi")) return FOR(TYPES(INTEGERS), &binary<MulHigh, T, T, T>);
    return FOR(TYPES(INTEGERS, FLOATS), &binary<Mul, T, T, T>);
  }
  if (name == "mad") {
    if (op.has("wide")) return type == "u32" ? &ternary<Mad, u64, u32> : &ternary<Mad, s64, s32>;
    if (op.has("lo")) return FOR(TYPES(INTEGERS), &ternary<Mad, T, T>);
  }
  if (name == "fma") {
    if (op.has("rm") && type == "f32") return &rounded<Fma, 0x2000>;
    if (op.has("rp") && type == "f32") return &rounded<Fma, 0x4000>;
    if (op.has("rz") && type == "f32") return &rounded<Fma, 0x6000>;
    return FOR(TYPES(FLOATS), &ternary<Fma, T, T>);
  }
  if (name == "div") return FOR(TYPES(INTEGERS, FLOATS), &binary<Div, T, T, T>);
  if (name == "rem") return FOR(TYPES(INTEGERS), &binary<Rem, T, T, T>);
  if (name == "max") return FOR(TYPES(INTEGERS, FLOATS), &binary<Max, T, T, T>);
  if (name == "min") return FOR(TYPES(INTEGERS, FLOATS), &binary<Min, T, T, T>);
  if (name == "and") return predicate ? &predicates<0> : FOR(TYPES(BITS), &binary<And, T, T, T>);
  if (name == "or") return predicate ? &predicates<1> : FOR(TYPES(BITS), &binary<Or, T, T, T>);
  if (name == "xor") return predicate ? &predicates<2> : FOR(TYPES(BITS), &binary<Xor, T, T, T>);
  if (name == "not") return predicate ? &predicates<3> : FOR(TYPES(BITS), &unary<Not, T, T>);
  if (name == "shl") return FOR(TYPES(BITS), &binary<Shl, T, T, u32>);
  if (name == "shr") return FOR(TYPES(INTEGERS), &binary<Shr, T, T, u32>);
  if (name == "neg") return FOR(TYPES(s16, s32, s64, FLOATS), &unary<Neg, T, T>);
  if (name == "abs") return FOR(TYPES(s32, s64, FLOATS), &unary<Abs, T, T>);
  if (name == "sqrt") return FOR(TYPES(FLOATS), &unary<Sqrt, T, T>);
  if (name == "rcp") return FOR(TYPES(FLOATS), &unary<Rcp, T, T>);
  if (name == "rsqrt") return FOR(TYPES(FLOATS), &unary<Rsqrt, T, T>);
  if (name == "ex2" && type == "f32")
    return op.has("ftz") ? &unary<Ex2Ftz, float, float> : &unary<Ex2, float, float>;
  if (name == "lg2" && type == "f32") return &unary<Lg2, float, float>;
  if (name == "tanh" && type == "f32") return &unary<Tanh, float, float>;
  if (name == "sin" && type == "f32") return &unary<Sin, float, float>;
  if (name == "cos" && type == "f32") return &unary<Cos, float, float>;
  if (name == "popc") return FOR(TYPES(u32, u64), &unary<Popc, u32, T>);
  if (name == "brev") return FOR(TYPES(u32, u64), &unary<Brev, T, T>);
  if (name == "clz") return FOR(TYPES(u32, u64), &unary<Clz, u32, T>);
  if (name == "bfind") {
    if (op.has("shiftamt")) return FOR(TYPES(u32, u64), &unary<BfindShift, u32, T>);
    return FOR(TYPES(u32, u64), &unary<Bfind, u32, T>);
  }
  if (name == "bfi") return &bfi;
  if (name == "bfe") return FOR(TYPES(u32, s32, u64, s64), &bfe<T>);
  if (name == "prmt" && op.parts.size() == 2) return &prmt;
  if (name == "lop3") return &lop3;
  if (name == "shf") {
    i.count = op.has("wrap") ? 1 : 0;
    return op.has("l") ? &shf<true> : &shf<false>;
  }
  if (name == "setp") return setp(op, i, type);
  if (name == "selp") return FOR(TYPES(INTEGERS, FLOATS), &selp<T>);
  if (name == "cvt") return cvt(op);
  if (name == "cvta") {
    const bool to = op.has("to");
    if (op.has("shared")) return to ? &cvta_shared<true> : &cvta_shared<false>;
    if (op.has("local") && !to) return &cvta_local;
    if (op.has("global") || op.has("param") || op.has("const")) return &unary<Move, u64, u64>;
  }
  if (name == "ld" || name == "ldu" || name == "st" || name == "atom" || name == "red") {
    i.space = op.has("global")                            ? Space::global
              : op.has("shared") || op.has("shared::cta") ? Space::shared
              : op.has("local")                           ? Space::local
              : op.has("param")                           ? Space::param
                                                          : Space::generic;
    if (name == "atom" || name == "red") {
      i.outputs = name == "atom";
      return reduction(op[-2], type, false);
    }
    i.nc = op.has("nc");
    i.count = op.has("v2") ? 2 : op.has("v4") ? 4 : 1;
    i.outputs = name == "st" ? 0 : uint8_t(i.count);
    if (name == "st") return FOR(TYPES(u8, s8, INTEGERS, FLOATS), &store<Word<T>>);
    return FOR(TYPES(u8, s8, INTEGERS, FLOATS), &load<Word<T>>);
  }
  if (name == "bra") return &bra;
  if (name == "ret" || name == "exit") return &leave;
  if (name == "bar" || name == "barrier") {
    if (op.has("warp")) {
      i.members = 0;
      return &warp_barrier;
    }
    if (!op.has("sync")) return nullptr;
    i.members = -2;
    i.outputs = 0;
    return &barrier;
  }
  if (name == "membar" || name == "fence") return &nothing;
  if (name == "activemask") return &activemask;
  if (name == "shfl" && op.has("sync")) {
    i.outputs = i.o[1].size == 0 ? 2 : 1;
    i.members = int(i.o.size()) - 1;
    return op.has("up")     ? &shuffle<0>
           : op.has("down") ? &shuffle<1>
           : op.has("bfly") ? &shuffle<2>
                            : &shuffle<3>;
  }
  if (name == "vote" && op.has("sync")) {
    i.members = 2;
    return op.has("any")   ? &vote<0>
           : op.has("all") ? &vote<1>
           : op.has("uni") ? &vote<2>
                           : &vote<3>;
  }
  if (name == "match" && op.has("any")) {
    i.members = 2;
    return &match_any;
  }
  if (name == "redux") {
    i.members = 2;
    return reduction(op[2], type, true);
  }
  if (name == "ldmatrix") {
    i.members = -2;
    i.space = Space::shared;
    i.count = op.has("x4") ? 4 : op.has("x2") ? 2 : 1;
    return op.has("trans") ? &ldmatrix<true> : &ldmatrix<false>;
  }
  if (name == "mma" && op.has("row") && op.has("col") && type == "f32" && op[-4] == "f32") {
    i.members = -2;
    const bool deep = op.has("m16n8k16");
    if (!deep && !op.has("m16n8k8")) return nullptr;
    if (op.has("bf16")) return deep ? &mma<of_bf16, 16> : &mma<of_bf16, 8>;
    if (op.has("f16")) return deep ? &mma<of_f16, 16> : &mma<of_f16, 8>;
  }
  if (name == "cp" && op.has("async")) {
    i.outputs = 0;
    if (op.has("commit_group")) return &commit;
    if (op.has("wait_group") || op.has("wait_all")) return &wait_group;
    if (op.has("ca") || op.has("cg")) return &cp_async;
  }
  return nullptr;
}

}  // namespace

void select(const std::string& opcode, Instruction& i) {
  i.run = find(Opcode(opcode), i);
  if (!i.run) throw Error("unknown opcode " + opcode);
}

}  // namespace ptx
