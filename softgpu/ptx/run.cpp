// SPDX-License-Identifier: Apache-2.0
// A warp: its lanes diverge, wait for each other, and meet again.
#include <algorithm>
#include <climits>
#include <sstream>

#include "ptx/warp.h"

namespace ptx {

void Warp::outside(uint32_t offset, size_t bytes) const {
  throw Error("shared memory: offset " + std::to_string(offset) + " + " + std::to_string(bytes) +
              " of " + std::to_string(block->shared_size));
}

void Warp::start(Mask lanes) {
  pc = 0;
  group = live = whole = lanes;
  carry = 0;
  others.clear();
  barrier = -1;
  reduction = nullptr;
  limit = INT_MAX;
  alone_until = 0;
  for (int l = 0; l < kLanes; ++l) copies[l].clear(), groups[l].clear();
}

// The next pc at which something happens to the other lanes: they join, or are behind and go first.
void Warp::look_around() {
  limit = INT_MAX;
  if (steps < alone_until) return;
  for (const Group& g : others)
    if (!g.parked || g.pc >= pc) limit = std::min(limit, g.pc);
}

// Continues with the lanes that are furthest behind; `park`: these wait for others at pc.
void Warp::reschedule(bool park) {
  if (group) others.push_back({pc, group, park});
  std::sort(others.begin(), others.end(), [](auto& a, auto& b) { return a.pc < b.pc; });
  for (size_t i = 0; i + 1 < others.size();) {
    if (others[i].pc == others[i + 1].pc) {
      others[i].mask |= others[i + 1].mask;
      others[i].parked = false;
      others.erase(others.begin() + long(i) + 1);
    } else {
      ++i;
    }
  }
  const auto next =
      std::find_if(others.begin(), others.end(), [](const Group& g) { return !g.parked; });
  if (next == others.end()) {
    std::ostringstream s;
    s << "diverged warp: lanes wait for each other";
    for (const Group& g : others) {
      const Instruction& i = kernel->code[g.pc];
      s << "; " << std::hex << g.mask << std::dec << " at PTX line " << i.line;
      if (i.source >= 0) s << " (" << kernel->sources[i.source] << ")";
    }
    throw Error(s.str());
  }
  pc = next->pc;
  group = next->mask;
  others.erase(next);
  look_around();
}

// Lanes that are ahead have a turn: those behind may be waiting for what they do.
void Warp::give_way() {
  constexpr uint64_t kTurn = 4096;
  const auto ahead =
      std::find_if(others.rbegin(), others.rend(), [](const Group& g) { return !g.parked; });
  if (ahead == others.rend()) return;
  std::swap(pc, ahead->pc);
  std::swap(group, ahead->mask);
  alone_until = steps + kTurn;
  look_around();
}

void Warp::branch(int to, Mask taken) {
  if (!taken) return;
  if (taken == group) {
    pc = to;
  } else {
    others.push_back({to, taken, false});
    group &= ~taken;
    ++pc;
  }
  jumped = true;
  look_around();
}

void Warp::leave(Mask lanes) {
  live &= ~lanes;
  group &= ~lanes;
  for (Group& g : others) g.parked = false;  // it may have waited for these lanes
  if (group) return;
  jumped = true;
  if (!others.empty()) reschedule(false);
}

// Whether all members of a collective are here; if not, others run.
bool Warp::gather(const Instruction& i) {
  Mask members = live;
  if (i.members >= 0) {
    members = Mask(lane_value(i.o[i.members], __builtin_ctz(mask)));
    for (Mask m = mask; m; m &= m - 1)
      if (Mask(lane_value(i.o[i.members], __builtin_ctz(m))) != members)
        throw Error("lanes name different members");
    if (mask & ~members) throw Error("a lane is not in its own mask");
    if (members & ~live) throw Error("the mask names lanes that have returned, or never were");
  }
  if (!(members & ~mask)) return true;
  if (members & group & ~mask) throw Error("collective whose guard is false in some lanes");
  reschedule(true);
  return false;
}

template <bool kProfile>
void Warp::work() {
  while (live && steps < pause) {
    if (pc >= limit) reschedule(false);
    const Instruction& i = kernel->code[pc];
    mask = group;
    if (i.guarded) mask &= predicate(i.guard);
    ++steps;
    if (!mask) {
      if constexpr (kProfile) {
        ++block->profile->issued;
        ++block->profile->classes[size_t(i.kind)];
      }
      i.ran |= i.target >= 0;  // a branch that was reached
      ++pc;
      continue;
    }
    if (i.members != kNobody && !gather(i)) continue;
    if constexpr (kProfile) {
      Profile& p = *block->profile;
      ++p.issued;
      ++p.classes[size_t(i.kind)];
      p.lanes += unsigned(__builtin_popcount(mask));
      p.flops += i.flops;
    }
    jumped = false;
    i.ran = true;
    i.run(*this, i);
    if (!jumped) ++pc;
    if (barrier >= 0) return;
  }
}

void Warp::run(uint64_t turn) {
  barrier = -1;
  pause = steps + turn;
  if (block->profile)
    work<true>();
  else
    work<false>();
  if (live && barrier < 0) give_way();
}

}  // namespace ptx
