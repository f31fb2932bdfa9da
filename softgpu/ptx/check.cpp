// SPDX-License-Identifier: Apache-2.0
// Who touched each byte of shared and global memory in a launch, and what no barrier ordered.
// Barriers order a block, bar.warp.sync a warp; shuffles and votes order nothing.
#include <array>
#include <sstream>
#include <unordered_map>

#include "ptx/ptx.h"

namespace ptx {
namespace {

struct Touch {
  uint32_t thread = ~0u;  // of the launch; ~0: nobody
  uint16_t block_epoch = 0, warp_epoch = 0;
  bool atomic = false;
  int line = 0;
};
struct Byte {
  Touch write, read[2];
  bool by_nc = false;
};
constexpr size_t kPage = 1024;
using Page = std::array<Byte, kPage>;

}  // namespace

struct Checker::State {
  std::unordered_map<uint64_t, std::unique_ptr<Page>> pages;
  uint64_t last = ~0ull;
  Page* page = nullptr;
  Byte& at(uint64_t address) {
    if (const uint64_t n = address / kPage; n != last) {
      auto& p = pages[n];
      if (!p) p = std::make_unique<Page>();
      last = n;
      page = p.get();
    }
    return (*page)[address % kPage];
  }
};

Checker::Checker() : state(std::make_unique<State>()) {}
Checker::~Checker() = default;

void Checker::new_block(const char* shared, size_t size) {
  for (size_t i = 0; i < size; ++i) state->at(reinterpret_cast<uint64_t>(shared + i)) = Byte{};
}

void Checker::access(const Warp& w, int lane, const char* p, size_t bytes, Access kind) {
  const bool in_shared =
      p >= w.block->shared_base && p < w.block->shared_base + w.block->shared_size;
  const uint32_t block = w.block->number;
  Touch now{(block << 10) + uint32_t(w.number) * kLanes + uint32_t(lane), uint16_t(w.block->epoch),
            uint16_t(w.epoch), kind == Access::atomic, w.kernel->code[w.pc].line};
  const auto fail = [&](const char* what, const Touch& other, size_t i) {
    std::ostringstream s;
    s << what << ": thread " << (now.thread & 1023) << " at PTX line " << now.line << ", thread "
      << (other.thread & 1023);
    if (other.thread >> 10 != block) s << " of block " << (other.thread >> 10);
    s << " at PTX line " << other.line << ", " << (in_shared ? "shared memory " : "global memory ");
    if (in_shared)
      s << (p + i - w.block->shared_base);
    else
      s << static_cast<const void*>(p + i);
    throw Error(s.str());
  };
  const auto unordered = [&](const Touch& t) {
    if (t.thread == ~0u || t.thread == now.thread || (t.atomic && now.atomic)) return false;
    if (t.thread >> 10 != block) return true;
    if (t.block_epoch != now.block_epoch) return false;
    return t.thread / kLanes != now.thread / kLanes || t.warp_epoch == now.warp_epoch;
  };
  for (size_t i = 0; i < bytes; ++i) {
    Byte& b = state->at(reinterpret_cast<uint64_t>(p + i));
    const bool writes = kind == Access::write || kind == Access::atomic;
    if (kind == Access::nc && b.write.thread != ~0u)
      fail("read through the read-only path (.nc) of memory that the kernel writes", b.write, i);
    if (writes && b.by_nc)
      fail("write to memory that the kernel reads through the read-only path (.nc)", b.read[0], i);
    if (unordered(b.write)) fail(writes ? "race of two writes" : "race of a read", b.write, i);
    if (in_shared && !writes && b.write.thread == ~0u)
      fail("read of shared memory that nobody wrote", now, i);
    if (writes) {
      for (const Touch& r : b.read)
        if (unordered(r)) fail("race of a write and a read", r, i);
      b.write = now;
      if (kind == Access::write) b.read[0] = b.read[1] = Touch{};
    } else {
      b.by_nc |= kind == Access::nc;
      if (b.read[0].thread != now.thread) b.read[1] = b.read[0];
      b.read[0] = now;
    }
  }
}

}  // namespace ptx
