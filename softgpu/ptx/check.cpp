// SPDX-License-Identifier: Apache-2.0
// Who touched each byte of shared and global memory in a launch, and what no barrier ordered.
// Barriers order the warps that take part, bar.warp.sync the lanes it names; shuffles and votes
// order nothing, nor does a fence with an atomic. Nothing orders two blocks.
#include <algorithm>
#include <array>
#include <sstream>
#include <unordered_map>

#include "ptx/warp.h"

namespace ptx {
namespace {

constexpr uint32_t kNobodyYet = ~0u;

struct Touch {
  uint32_t block = kNobodyYet;
  uint16_t warp = 0, lane = 0;
  uint16_t warp_clock = 0, lane_clock = 0;  // barriers that the toucher had passed
  bool strong = false;
  int line = 0;

  bool by(const Touch& o) const { return block == o.block && warp == o.warp && lane == o.lane; }
  unsigned thread() const { return unsigned(warp) * kLanes + lane; }
};
struct Byte {
  Touch write, read[2];
  bool by_nc = false;
};
constexpr size_t kPage = 1024;
using Page = std::array<Byte, kPage>;

// What a warp knows of the others, and its lanes of each other: the clocks that a barrier passed
// on.
struct Knowledge {
  std::vector<uint16_t> warps;
  std::array<uint16_t, kLanes> clock{};
  std::array<std::array<uint16_t, kLanes>, kLanes> lanes{};
};

void join(std::vector<uint16_t>& a, const std::vector<uint16_t>& b) {
  for (size_t n = 0; n < a.size(); ++n) a[n] = std::max(a[n], b[n]);
}

bool may_touch(const std::vector<std::pair<const char*, size_t>>& only, const char* p,
               size_t bytes) {
  return only.empty() || std::any_of(only.begin(), only.end(), [&](const auto& range) {
           return p >= range.first && p + bytes <= range.first + range.second;
         });
}

}  // namespace

struct Checker::State {
  std::unordered_map<uint64_t, std::unique_ptr<Page>> pages;
  uint64_t last = ~0ull;
  Page* page = nullptr;
  std::vector<Knowledge> warps;
  std::array<std::vector<uint16_t>, 16> arriving, leaving;  // of the barriers

  Byte& at(uint64_t address) {
    if (const uint64_t n = address / kPage; n != last) {
      auto& p = pages[n];
      if (!p) p = std::make_unique<Page>();
      last = n;
      page = p.get();
    }
    return (*page)[address % kPage];
  }
  bool ordered(const Touch& then, const Touch& now) const {
    if (then.block == kNobodyYet || then.by(now)) return true;
    if (then.block != now.block) return false;
    const Knowledge& k = warps[now.warp];
    if (then.warp != now.warp) return k.warps[then.warp] > then.warp_clock;
    return then.warp_clock < now.warp_clock || k.lanes[now.lane][then.lane] > then.lane_clock;
  }
  bool race(const Touch& then, const Touch& now) const {
    return !(then.strong && now.strong) && !ordered(then, now);
  }
};

Checker::Checker() : state(std::make_unique<State>()) {}
Checker::~Checker() = default;

void Checker::new_block(const char* shared, size_t size, unsigned warps) {
  for (size_t i = 0; i < size; ++i) state->at(reinterpret_cast<uint64_t>(shared + i)) = Byte{};
  state->warps.assign(warps, {});
  for (Knowledge& k : state->warps) k.warps.assign(warps, 0);
  state->arriving.fill({});
  state->leaving.fill({});
}

void Checker::warp_barrier(const Warp& w, Mask members) {
  Knowledge& k = state->warps[size_t(w.number)];
  std::array<uint16_t, kLanes> all{};
  for (int l = 0; l < kLanes; ++l) {
    if (!(members >> l & 1)) continue;
    k.lanes[l][l] = ++k.clock[l];
    for (int m = 0; m < kLanes; ++m) all[m] = std::max(all[m], k.lanes[l][m]);
  }
  for (int l = 0; l < kLanes; ++l)
    if (members >> l & 1) k.lanes[l] = all;
}

void Checker::arrive(int warp, int barrier) {
  Knowledge& k = state->warps[size_t(warp)];
  ++k.warps[size_t(warp)];
  auto& all = state->arriving[size_t(barrier)];
  all.resize(k.warps.size());
  join(all, k.warps);
}
void Checker::complete(int barrier) {
  state->leaving[size_t(barrier)] = std::move(state->arriving[size_t(barrier)]);
  state->arriving[size_t(barrier)].clear();
}
void Checker::depart(int warp, int barrier) {
  join(state->warps[size_t(warp)].warps, state->leaving[size_t(barrier)]);
}

void Checker::access(const Warp& w, int lane, const char* p, size_t bytes, Access kind) {
  const Knowledge& k = state->warps[size_t(w.number)];
  const bool in_shared = w.is_shared(p);
  const Touch now{.block = w.block->number,
                  .warp = uint16_t(w.number),
                  .lane = uint16_t(lane),
                  .warp_clock = k.warps[size_t(w.number)],
                  .lane_clock = k.clock[size_t(lane)],
                  .strong = kind.strong,
                  .line = w.kernel->code[size_t(w.pc)].line};
  const auto fail = [&](const char* what, const Touch& other, size_t i) {
    std::ostringstream s;
    s << what << ": thread " << now.thread() << " at PTX line " << now.line << ", thread "
      << other.thread();
    if (other.block != now.block) s << " of block " << other.block;
    s << " at PTX line " << other.line << ", " << (in_shared ? "shared memory " : "global memory ");
    if (in_shared)
      s << (p + i - w.block->shared_base);
    else
      s << static_cast<const void*>(p + i);
    throw Error(s.str());
  };
  if (const char* own = w.local_of(lane); p >= own && p < own + w.kernel->local) return;
  if (!in_shared && !may_touch(w.block->options->only, p, bytes)) {
    std::ostringstream s;
    s << "outside of the memory that the kernel was given: thread " << now.thread()
      << " at PTX line " << now.line << ", " << bytes << " bytes at global memory "
      << static_cast<const void*>(p);
    throw Error(s.str());
  }
  for (size_t i = 0; i < bytes; ++i) {
    Byte& b = state->at(reinterpret_cast<uint64_t>(p + i));
    const bool written = b.write.block != kNobodyYet;
    if (kind.nc && written)
      fail("read through the read-only path (.nc) of memory that the kernel writes", b.write, i);
    if (kind.writes && b.by_nc)
      fail("write to memory that the kernel reads through the read-only path (.nc)", b.read[0], i);
    if (state->race(b.write, now))
      fail(kind.writes ? "race of two writes" : "race of a read", b.write, i);
    if (in_shared && kind.reads && !written)
      fail("read of shared memory that nobody wrote", now, i);
    if (kind.writes) {
      for (const Touch& r : b.read)
        if (state->race(r, now)) fail("race of a write and a read", r, i);
      b.write = now;
      if (!kind.reads) b.read[0] = b.read[1] = Touch{};
    } else {
      b.by_nc |= kind.nc;
      if (!b.read[0].by(now)) b.read[1] = b.read[0];
      b.read[0] = now;
    }
  }
}

}  // namespace ptx
