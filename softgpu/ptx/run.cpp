// SPDX-License-Identifier: Apache-2.0
// Warps, blocks, launches.
#include <signal.h>

#include <algorithm>
#include <chrono>
#include <climits>
#include <cstring>
#include <sstream>

#include "ptx/ptx.h"

namespace ptx {

void Warp::outside(uint32_t offset, size_t bytes) const {
  throw Error("shared memory: offset " + std::to_string(offset) + " + " + std::to_string(bytes) +
              " of " + std::to_string(block->shared_size));
}

void Warp::start(Mask lanes) {
  pc = 0;
  group = live = lanes;
  others.clear();
  barrier = -1;
  limit = INT_MAX;
  for (int l = 0; l < kLanes; ++l) copies[l].clear(), groups[l].clear();
}

// The next pc at which something happens to the other lanes: they join, or are behind and go first.
void Warp::look_around() {
  limit = INT_MAX;
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

void Warp::branch(int to, Mask taken) {
  if (!taken) return;
  if (taken == group) {
    pc = to;
    jumped = true;
  } else {
    others.push_back({to, taken, false});
    group &= ~taken;
    ++pc;
    jumped = true;
  }
  look_around();
}

void Warp::leave(Mask lanes) {
  live &= ~lanes;
  group &= ~lanes;
  if (group) return;
  jumped = true;
  if (!others.empty()) reschedule(false);
}

void Warp::run() {
  barrier = -1;
  while (live) {
    if (pc >= limit) reschedule(false);
    const Instruction& i = kernel->code[pc];
    mask = group;
    if (i.guarded) mask &= predicate(i.guard);
    ++steps;
    lane_steps += unsigned(__builtin_popcount(mask));
    if (!mask) {
      i.ran |= i.target >= 0;  // a branch that was reached
      ++pc;
      continue;
    }
    if (i.members != -1) {
      Mask members = live;
      if (i.members >= 0) {
        members = Mask(lane_value(i.o[i.members], __builtin_ctz(mask)));
        for (Mask m = mask; m; m &= m - 1)
          if (Mask(lane_value(i.o[i.members], __builtin_ctz(m))) != members)
            throw Error("lanes name different members");
        if (mask & ~members) throw Error("a lane is not in its own mask");
        if (members & ~live) throw Error("the mask names lanes that have returned, or never were");
      }
      if (members & ~mask) {
        if (members & group & ~mask) throw Error("collective whose guard is false in some lanes");
        reschedule(true);
        continue;
      }
    }
    jumped = false;
    i.ran = true;
    i.run(*this, i);
    if (!jumped) ++pc;
    if (barrier >= 0) return;
  }
}

Options options;

namespace {

[[noreturn]] void at_fault(int, siginfo_t* info, void*) {
  std::ostringstream s;
  s << "invalid address " << info->si_addr;
  throw Error(s.str());
}

// Turns a fault of this thread into an Error while it lives.
struct Faults {
  struct sigaction old[2];
  Faults() {
    struct sigaction a{};
    a.sa_sigaction = at_fault;
    a.sa_flags = SA_SIGINFO | SA_NODEFER;
    sigaction(SIGSEGV, &a, &old[0]);
    sigaction(SIGBUS, &a, &old[1]);
  }
  ~Faults() {
    sigaction(SIGSEGV, &old[0], nullptr);
    sigaction(SIGBUS, &old[1], nullptr);
  }
};

void run_block(std::vector<Warp>& warps) {
  for (;;) {
    bool all_ended = true, any_ran = false;
    for (Warp& w : warps) {
      if (!w.live || w.barrier >= 0) {
        all_ended &= !w.live;
        continue;
      }
      any_ran = true;
      w.run();
      all_ended &= !w.live;
    }
    if (all_ended) return;
    for (Warp& w : warps) {  // release a barrier that is complete
      if (!w.live || w.barrier < 0) continue;
      unsigned arrived = 0, threads = 0;
      for (Warp& v : warps) {
        if (v.live && v.barrier == w.barrier) arrived += kLanes;
        threads += kLanes;
      }
      if (arrived == (w.expected ? w.expected : threads)) {
        const int number = w.barrier;
        for (Warp& v : warps)
          if (v.barrier == number) v.barrier = -1;
        any_ran = true;
        ++w.block->epoch;
      }
    }
    if (!any_ran) {
      std::string who;
      for (Warp& w : warps) {
        if (w.live) {
          const Instruction& i = w.kernel->code[std::max(0, w.pc - 1)];
          who += "; warp " + std::to_string(w.number) + " at PTX line " + std::to_string(i.line);
        } else {
          who += "; warp " + std::to_string(w.number) + " has returned";
        }
      }
      throw Error("barrier that not all threads reach" + who);
    }
  }
}

}  // namespace

void launch(Kernel& k, Dim grid, Dim block, size_t dynamic_shared) {
  const Faults faults;
  const auto began = std::chrono::steady_clock::now();
  const unsigned threads = block.count(), count = (threads + kLanes - 1) / kLanes;
  if (k.max_threads && threads > k.max_threads) throw Error(k.name + ": too many threads");
  const size_t a = k.dynamic_align, dynamic_at = (k.static_shared + a - 1) / a * a;
  for (const Operand& o : k.dynamic_shared)
    for (int l = 0; l < kLanes; ++l) memcpy(&k.file[o.at + l * o.size], &dynamic_at, o.size);
  Block b;
  b.shared_size = dynamic_at + dynamic_shared;
  b.shared.resize(b.shared_size + 1024);
  b.shared_base = reinterpret_cast<char*>((reinterpret_cast<uintptr_t>(b.shared.data()) + 1023) &
                                          ~uintptr_t(1023));
  Checker checker;
  if (options.check) b.checker = &checker;
  std::vector<Warp> warps(count);
  for (unsigned n = 0; n < count; ++n) {
    Warp& w = warps[n];
    w.kernel = &k;
    w.block = &b;
    w.number = int(options.reverse ? count - 1 - n : n);
    w.storage.resize(k.file.size() + 64);
    w.file = reinterpret_cast<unsigned char*>((reinterpret_cast<uintptr_t>(w.storage.data()) + 63) &
                                              ~uintptr_t(63));
    w.local.resize(k.local * kLanes);
  }
  const auto special = [&](Warp& w, const char* name, auto value) {
    const auto found = k.specials.find(name);
    if (found == k.specials.end()) return;
    for (unsigned l = 0; l < kLanes; ++l) {
      const uint32_t v = value(l);
      memcpy(w.file + found->second + 4 * l, &v, 4);
    }
  };
  for (const auto& [name, at] : k.specials) {
    static const char* known[] = {"%tid.x",    "%tid.y",    "%tid.z",   "%ntid.x",  "%ntid.y",
                                  "%ntid.z",   "%ctaid.x",  "%ctaid.y", "%ctaid.z", "%nctaid.x",
                                  "%nctaid.y", "%nctaid.z", "%laneid"};
    if (std::find(std::begin(known), std::end(known), name) == std::end(known))
      throw Error(k.name + ": unknown register " + name);
  }
  for (unsigned i = 0; i < grid.count(); ++i) {
    const unsigned n = options.reverse ? grid.count() - 1 - i : i;
    b.number = n;
    if (options.check) checker.new_block(b.shared_base, b.shared_size);
    const Dim at{n % grid.x, n / grid.x % grid.y, n / grid.x / grid.y};
    memset(b.shared.data(), 0xff, b.shared.size());
    for (Warp& w : warps) {
      memcpy(w.file, k.file.data(), k.file.size());
      std::fill(w.local.begin(), w.local.end(), 0xff);
      const unsigned first = unsigned(w.number) * kLanes;
      special(w, "%tid.x", [&](unsigned l) { return (first + l) % block.x; });
      special(w, "%tid.y", [&](unsigned l) { return (first + l) / block.x % block.y; });
      special(w, "%tid.z", [&](unsigned l) { return (first + l) / block.x / block.y; });
      special(w, "%laneid", [&](unsigned l) { return l; });
      const unsigned values[3][3] = {
          {block.x, block.y, block.z}, {at.x, at.y, at.z}, {grid.x, grid.y, grid.z}};
      const char* names[3] = {"%ntid.", "%ctaid.", "%nctaid."};
      for (int i = 0; i < 3; ++i)
        for (int d = 0; d < 3; ++d)
          special(w, (std::string(names[i]) + "xyz"[d]).c_str(),
                  [&](unsigned) { return values[i][d]; });
      const unsigned lanes = std::min<unsigned>(kLanes, threads - first);
      w.start(lanes == kLanes ? ~0u : (1u << lanes) - 1);
    }
    try {
      run_block(warps);
    } catch (const Error& e) {
      std::ostringstream s;
      s << k.name << ": block " << at.x << "," << at.y << ": " << e.what();
      for (Warp& w : warps) {
        if (!w.live || w.barrier >= 0) continue;
        const Instruction& i = k.code[w.pc];
        s << " [warp " << w.number << ", lanes " << std::hex << w.mask << std::dec << ", PTX line "
          << i.line;
        if (i.source >= 0) s << ", " << k.sources[i.source];
        s << "]";
        break;
      }
      throw Error(s.str());
    }
  }
  for (Warp& w : warps) k.work.steps += w.steps, k.work.lane_steps += w.lane_steps;
  k.work.seconds += std::chrono::duration<double>(std::chrono::steady_clock::now() - began).count();
  ++k.work.launches;
}

}  // namespace ptx
