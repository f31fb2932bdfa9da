// SPDX-License-Identifier: Apache-2.0
// Branches, barriers, and what ends a thread.
#include "ptx/lanes.h"
#include "ptx/opcode.h"

namespace ptx {
namespace {

void bra(Warp& w, const Instruction& i) { w.branch(i.target, w.mask); }
// Operands: the index; then, as numbers, the places in the code of the targets.
void brx(Warp& w, const Instruction& i) {
  std::vector<Mask> taken(size_t(i.count));
  each(w.mask, [&](int l) {
    const u32 n = take<u32>(w, i.o[0], l);
    if (n >= taken.size()) throw Error("brx.idx: index " + std::to_string(n) + " has no target");
    taken[n] |= Mask(1) << l;
  });
  const auto target = [&](size_t n) { return int(take<u32>(w, i.o[1 + n], 0)); };
  size_t last = taken.size() - 1;
  while (!taken[last]) --last;
  for (size_t n = 0; n < last; ++n) {
    if (!taken[n]) continue;
    w.others.push_back({target(n), taken[n], false});
    w.group &= ~taken[n];
  }
  w.branch(target(last), taken[last]);
}
void leave(Warp& w, const Instruction&) { w.leave(w.mask); }
void nothing(Warp&, const Instruction&) {}
void trap(Warp&, const Instruction&) { throw Error("trap"); }
void breakpoint(Warp&, const Instruction&) { throw Error("brkpt"); }

// Operands of __assertfail: message, file, line, function, size of a character.
void assertion(Warp& w, const Instruction& i) {
  const int l = __builtin_ctz(w.mask);
  const auto text = [&](size_t n) {
    return std::string(reinterpret_cast<const char*>(w.lane_value(i.o[n], l)));
  };
  throw Error("assertion failed: " + text(0) + " in " + text(3) + ", " + text(1) + ":" +
              std::to_string(w.lane_value(i.o[2], l)));
}

// --- barriers of the block; run.cpp lets the waiting warps go

void warp_barrier(Warp& w, const Instruction&) {
  if (w.block->checker) w.block->checker->warp_barrier(w, w.mask);
}

enum Reduce : u32 { kWaits, kPopc, kAnd, kOr, kArrives };

void barrier(Warp& w, const Instruction& i) {
  const size_t first = i.outputs;
  const int lane = __builtin_ctz(w.mask);
  const u32 number = take<u32>(w, i.o[first], lane);
  const bool reduces = i.mode == kPopc || i.mode == kAnd || i.mode == kOr;
  const bool counted = i.o.size() > first + 1 + reduces;
  const u32 threads = counted ? take<u32>(w, i.o[first + 1], lane) : kLanes * w.block->warps;
  if (number > 15) throw Error("barrier " + std::to_string(number) + " of 16");
  if (threads == 0 || threads % kLanes)
    throw Error("barrier: " + std::to_string(threads) + " threads are no whole warps");
  if (w.whole & ~w.live) throw Error("barrier: lanes of the warp have returned");
  Barrier& b = w.block->barriers[number];
  if (b.arrived && b.expected != threads)
    throw Error("barrier " + std::to_string(number) + ": of " + std::to_string(b.expected) +
                " threads, and of " + std::to_string(threads));
  b.expected = threads;
  b.arrived += kLanes;
  if (b.arrived > threads) throw Error("barrier " + std::to_string(number) + ": too many threads");
  if (reduces) {
    const Mask p = w.predicate(i.o.back()) & w.mask;
    b.count += unsigned(__builtin_popcount(w.mask));
    b.holds += unsigned(__builtin_popcount(p));
    w.reduction = &i;
  }
  if (w.block->checker) w.block->checker->arrive(w.number, int(number));
  if (i.mode != kArrives) w.barrier = int(number);
}

Handler barrier_of(const Opcode& op, Instruction& i) {
  op.allow({"cta", "aligned"});
  if (op.has("warp")) {
    i.members = 0;
    i.outputs = 0;
    return op.has("sync") ? &warp_barrier : nullptr;
  }
  const std::string_view what = op.one_of({"sync", "arrive", "red"});
  i.members = kAllLive;
  i.outputs = what == "red";
  i.mode = what == "arrive" ? kArrives : kWaits;
  if (what == "red") {
    const std::string_view r = op.one_of({"popc", "and", "or"});
    i.mode = r == "popc" ? kPopc : r == "and" ? kAnd : kOr;
    op.allow({"u32", "pred"});
  }
  return what.empty() || i.o.size() < i.outputs + 1u ? nullptr : &barrier;
}

}  // namespace

// The result of a bar.red, when all have arrived.
void finish_reduction(Warp& w, const Barrier& b) {
  const Instruction& i = *w.reduction;
  w.reduction = nullptr;
  if (i.mode == kPopc)
    each(w.live, [&](int l) { put(w, i.o[0], l, b.holds); });
  else
    *w.at<Mask>(i.o[0]) = (i.mode == kAnd ? b.holds == b.count : b.holds > 0) ? ~0u : 0;
}

Handler barriers(const Opcode& op, Instruction& i) {
  if (op.name() == "bar" || op.name() == "barrier") return barrier_of(op, i);
  i.outputs = 0;  // fences: memory has one order here
  op.allow({"sc", "acq_rel", "acquire", "release", "cta", "cluster", "gpu", "gl", "sys"});
  return &nothing;
}

Handler control(const Opcode& op, Instruction& i) {
  const std::string& name = op.name();
  i.outputs = 0;
  if (name == "bra") return op.allow({"uni"}), &bra;
  if (name == "brx") {
    op.allow({"uni"});
    i.count = int(i.o.size()) - 1;
    return op.has("idx") ? &brx : nullptr;
  }
  if (name == "ret" || name == "exit") return op.allow({"uni"}), &leave;
  if (name == "call") return op.has("assertion") ? &assertion : nullptr;
  if (name == "trap") return &trap;
  if (name == "brkpt") return &breakpoint;
  if (name == "nanosleep") return op.has("u32") ? &nothing : nullptr;
  if (name == "griddepcontrol")  // grids run one after another
    return op.one_of({"wait", "launch_dependents"}) != "" ? &nothing : nullptr;
  return name == "pmevent" ? &nothing : nullptr;
}

}  // namespace ptx
