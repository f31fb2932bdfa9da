// SPDX-License-Identifier: Apache-2.0
// atom and red. Lanes take their turns in the order of their numbers.
#include <algorithm>

#include "ptx/addresses.h"
#include "ptx/numbers.h"
#include "ptx/opcode.h"

namespace ptx {
namespace {

template <class T>
T least(T a, T b) {
  if constexpr (std::is_floating_point_v<T>) return lesser(a, b);
  return std::min(a, b);
}
template <class T>
T most(T a, T b) {
  if constexpr (std::is_floating_point_v<T>) return greater(a, b);
  return std::max(a, b);
}
PTX_BINARY(Add, a + b);
PTX_BINARY(Max, most<A>(a, b));
PTX_BINARY(Min, least<A>(a, b));
PTX_BINARY(And, a& b);
PTX_BINARY(Or, a | b);
PTX_BINARY(Xor, a ^ b);
PTX_BINARY(Exchange, ((void)a, b));
PTX_BINARY(Increment, a >= b ? A(0) : A(a + 1));
PTX_BINARY(Decrement, a == 0 || a > b ? b : A(a - 1));

// One access of each lane: next(lane, old) is what it leaves.
template <class T, class F>
void modify(Warp& w, const Instruction& i, F next) {
  const int elements = i.count;
  const size_t bytes = sizeof(T) * size_t(elements);
  char* p[kLanes];
  each(w.mask, [&](int l) {
    p[l] = pointer(w, i, i.o[i.outputs], l, bytes);
    w.touch(l, p[l], bytes, kAtomic);
    for (int n = 0; n < elements; ++n) {
      T old;
      memcpy(&old, p[l] + sizeof(T) * size_t(n), sizeof old);
      const T value = next(l, n, old);
      memcpy(p[l] + sizeof(T) * size_t(n), &value, sizeof value);
      if (!i.outputs) continue;
      if constexpr (sizeof(T) == 16)
        w.at<T>(i.o[n])[l] = old;
      else
        put(w, i.o[n], l, widened(old));
    }
  });
  if (w.block->profile) count_request(w, i, w.mask, p, bytes, kAtomic);
}

template <class Op, class T>
void atomic(Warp& w, const Instruction& i) {
  modify<T>(w, i, [&](int l, int n, T old) {
    return Op::template f<T>(old, take<T>(w, i.o[i.outputs + 1 + n], l));
  });
}
template <class T>
void compare_and_swap(Warp& w, const Instruction& i) {
  const Operand &expected = i.o[i.outputs + 1], &desired = i.o[i.outputs + 2];
  modify<T>(w, i, [&](int l, int, T old) {
    return old == take<T>(w, expected, l) ? take<T>(w, desired, l) : old;
  });
}

// f16, bf16: kParts of them in a word.
template <class Op, float (*kWiden)(u16), u16 (*kNarrow)(float), class T>
void atomic_halves(Warp& w, const Instruction& i) {
  modify<T>(w, i, [&](int l, int n, T old) {
    const T value = take<T>(w, i.o[i.outputs + 1 + n], l);
    T r = 0;
    for (size_t b = 0; b < 8 * sizeof(T); b += 16) {
      const float x = kWiden(u16(old >> b)), y = kWiden(u16(value >> b));
      r |= T(T(kNarrow(Op::template f<float>(x, y))) << b);
    }
    return r;
  });
}
template <class Op>
Handler halves(std::string_view t) {
  if (t == "f16") return &atomic_halves<Op, of_f16, f16_of, u16>;
  if (t == "f16x2") return &atomic_halves<Op, of_f16, f16_of, u32>;
  if (t == "bf16") return &atomic_halves<Op, of_bf16, bf16_of, u16>;
  if (t == "bf16x2") return &atomic_halves<Op, of_bf16, bf16_of, u32>;
  return nullptr;
}

Handler operation(std::string_view name, std::string_view t) {
  if (name == "add") {
    if (const Handler h = halves<Add>(t)) return h;
    return PTX_FOR(PTX_TYPES(u32, s32, u64, s64, float, double), t, &atomic<Add, T>);
  }
  if (name == "max") {
    if (const Handler h = halves<Max>(t)) return h;
    return PTX_FOR(PTX_TYPES(u32, s32, u64, s64), t, &atomic<Max, T>);
  }
  if (name == "min") {
    if (const Handler h = halves<Min>(t)) return h;
    return PTX_FOR(PTX_TYPES(u32, s32, u64, s64), t, &atomic<Min, T>);
  }
  if (name == "and") return PTX_FOR(PTX_TYPES(u32, u64), t, &atomic<And, T>);
  if (name == "or") return PTX_FOR(PTX_TYPES(u32, u64), t, &atomic<Or, T>);
  if (name == "xor") return PTX_FOR(PTX_TYPES(u32, u64), t, &atomic<Xor, T>);
  if (name == "inc") return t == "u32" ? &atomic<Increment, u32> : nullptr;
  if (name == "dec") return t == "u32" ? &atomic<Decrement, u32> : nullptr;
  if (name == "exch") {
    if (t == "b128") return &atomic<Exchange, u128>;
    return PTX_FOR(PTX_TYPES(u32, u64), t, &atomic<Exchange, T>);
  }
  if (name == "cas") {
    if (t == "b128") return &compare_and_swap<u128>;
    return PTX_FOR(PTX_TYPES(u16, u32, u64), t, &compare_and_swap<T>);
  }
  return nullptr;
}

}  // namespace

Handler atomics(const Opcode& op, Instruction& i) {
  op.allow({"relaxed", "acquire", "release", "acq_rel", "cta", "cluster", "gpu", "sys", "noftz",
            "L2::cache_hint"});
  const std::string_view space = op.one_of({"global", "shared", "shared::cta"});
  i.space = space.empty() ? Space::generic : space == "global" ? Space::global : Space::shared;
  const std::string_view vector = op.one_of({"v2", "v4", "v8"});
  i.count = vector.empty() ? 1 : vector[1] - '0';
  i.outputs = op.name() == "atom" ? uint8_t(i.count) : 0;
  return operation(
      op.one_of({"add", "max", "min", "and", "or", "xor", "inc", "dec", "exch", "cas"}), op.type());
}

}  // namespace ptx
