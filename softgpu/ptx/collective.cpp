// SPDX-License-Identifier: Apache-2.0
// Exchanges between the lanes of a warp. The warp's loop has seen that all members are here.
#include <algorithm>

#include "ptx/lanes.h"
#include "ptx/opcode.h"

namespace ptx {
namespace {

constexpr u32 kUndefined = 0xdeadbeef;  // what a lane gets from one that takes no part

enum Shuffle { kUp, kDown, kButterfly, kIndex };

template <Shuffle kKind>
void shuffle(Warp& w, const Instruction& i) {
  const Operand* o = &i.o[i.outputs - 1];
  u32 r[kLanes];
  Mask valid = 0;
  each(w.mask, [&](int l) {
    const int b = take<u32>(w, o[2], l) & 31, c = int(take<u32>(w, o[3], l));
    const int clamp = c & 31, segment = c >> 8 & 31;
    const int first = l & segment, last = first | (clamp & ~segment);
    int from = kKind == kUp          ? l - b
               : kKind == kDown      ? l + b
               : kKind == kButterfly ? l ^ b
                                     : first | (b & ~segment);
    const bool ok = kKind == kUp ? from >= last : from <= last;
    if (!ok) from = l;
    valid |= Mask(ok) << l;
    r[l] = w.mask >> from & 1 ? take<u32>(w, o[1], from) : kUndefined;
  });
  each(w.mask, [&](int l) { put(w, i.o[0], l, r[l]); });
  if (i.outputs == 2) w.set_predicate(i.o[1], valid);
}

enum Vote { kAny, kAll, kUniform };
template <Vote kKind>
void vote(Warp& w, const Instruction& i) {
  const Mask a = w.predicate(i.o[1]) & w.mask;
  const bool r = kKind == kAny ? a != 0 : a == w.mask || (kKind == kUniform && a == 0);
  w.set_predicate(i.o[0], r ? ~0u : 0);
}
void ballot(Warp& w, const Instruction& i) {
  const Mask a = w.predicate(i.o[1]) & w.mask;
  each(w.mask, [&](int l) { put(w, i.o[0], l, a); });
}

void match_any(Warp& w, const Instruction& i) {
  Mask r[kLanes] = {};
  each(w.mask, [&](int l) {
    const u64 value = w.lane_value(i.o[1], l);
    each(w.mask, [&](int m) { r[l] |= Mask(w.lane_value(i.o[1], m) == value) << m; });
  });
  each(w.mask, [&](int l) { put(w, i.o[0], l, r[l]); });
}
void match_all(Warp& w, const Instruction& i) {
  const Operand& a = i.o[i.outputs];
  const u64 value = w.lane_value(a, __builtin_ctz(w.mask));
  bool same = true;
  each(w.mask, [&](int l) { same &= w.lane_value(a, l) == value; });
  const Mask r = same ? w.mask : 0;
  each(w.mask, [&](int l) { put(w, i.o[0], l, r); });
  if (i.outputs == 2) w.set_predicate(i.o[1], same ? ~0u : 0);
}

PTX_BINARY(Add, a + b);
PTX_BINARY(Max, std::max<A>(a, b));
PTX_BINARY(Min, std::min<A>(a, b));
PTX_BINARY(And, a& b);
PTX_BINARY(Or, a | b);
PTX_BINARY(Xor, a ^ b);

template <class Op, class T>
void redux(Warp& w, const Instruction& i) {
  T r = take<T>(w, i.o[1], __builtin_ctz(w.mask));
  each(w.mask & (w.mask - 1), [&](int l) { r = Op::template f<T>(r, take<T>(w, i.o[1], l)); });
  each(w.mask, [&](int l) { put(w, i.o[0], l, widened(r)); });
}
template <class Op>
Handler redux_of(std::string_view t) {
  return PTX_FOR(PTX_TYPES(u32, s32), t, &redux<Op, T>);
}

void activemask(Warp& w, const Instruction& i) {
  each(w.mask, [&](int l) { put(w, i.o[0], l, w.mask); });
}
void elect(Warp& w, const Instruction& i) {
  const u32 leader = u32(__builtin_ctz(w.mask));
  each(w.mask, [&](int l) { put(w, i.o[0], l, leader); });
  w.set_predicate(i.o[1], Mask(1) << leader);
}

Handler shuffle_of(std::string_view kind) {
  if (kind == "up") return &shuffle<kUp>;
  if (kind == "down") return &shuffle<kDown>;
  if (kind == "bfly") return &shuffle<kButterfly>;
  return kind == "idx" ? &shuffle<kIndex> : nullptr;
}
Handler vote_of(std::string_view kind) {
  if (kind == "any") return &vote<kAny>;
  if (kind == "all") return &vote<kAll>;
  if (kind == "uni") return &vote<kUniform>;
  return kind == "ballot" ? &ballot : nullptr;
}
Handler reduction(const Opcode& op) {
  const std::string_view name = op.one_of({"add", "max", "min", "and", "or", "xor"});
  const std::string_view t = op.type();
  if (name == "add") return redux_of<Add>(t);
  if (name == "max") return redux_of<Max>(t);
  if (name == "min") return redux_of<Min>(t);
  if (name == "and") return redux_of<And>(t);
  if (name == "or") return redux_of<Or>(t);
  return name == "xor" ? redux_of<Xor>(t) : nullptr;
}

}  // namespace

Handler collective(const Opcode& op, Instruction& i) {
  const std::string& name = op.name();
  op.type();
  if (name == "activemask") return &activemask;
  if (!op.has("sync")) return nullptr;
  i.members = int(i.o.size()) - 1;
  i.outputs = i.o.size() > 1 && i.o[1].size == 0 ? 2 : 1;
  if (name == "shfl") return shuffle_of(op.one_of({"up", "down", "bfly", "idx"}));
  if (name == "elect") return i.outputs == 2 ? &elect : nullptr;
  if (name == "match") return op.one_of({"any", "all"}) == "any" ? &match_any : &match_all;
  i.outputs = 1;
  if (name == "vote") return vote_of(op.one_of({"any", "all", "uni", "ballot"}));
  return name == "redux" ? reduction(op) : nullptr;
}

}  // namespace ptx
