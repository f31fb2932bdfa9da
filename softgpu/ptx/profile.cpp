// SPDX-License-Identifier: Apache-2.0
// What a kernel's accesses cost, by a simple model of the memory system.
#include <algorithm>
#include <array>

#include "ptx/warp.h"

namespace ptx {
namespace {

constexpr uint64_t kSector = 32;
constexpr int kBanks = 32, kBankBytes = 4;

// Different sectors that the lanes touch.
uint64_t sectors(Mask lanes, char* const* p, size_t bytes) {
  std::vector<uint64_t> all;
  for (Mask m = lanes; m; m &= m - 1) {
    const auto first = reinterpret_cast<uint64_t>(p[__builtin_ctz(m)]);
    for (uint64_t s = first / kSector; s <= (first + bytes - 1) / kSector; ++s) all.push_back(s);
  }
  std::sort(all.begin(), all.end());
  return uint64_t(std::unique(all.begin(), all.end()) - all.begin());
}

// Different bytes that the lanes ask for: their accesses are aligned, so that two are of the same
// bytes or of none.
uint64_t different_bytes(Mask lanes, char* const* p, size_t bytes) {
  std::vector<const char*> all;
  for (Mask m = lanes; m; m &= m - 1) all.push_back(p[__builtin_ctz(m)]);
  std::sort(all.begin(), all.end());
  return bytes * uint64_t(std::unique(all.begin(), all.end()) - all.begin());
}

// The most different words that one bank has to give to these lanes.
uint64_t wavefronts_of(Mask lanes, char* const* p, size_t bytes, const char* base) {
  std::array<std::vector<uint64_t>, kBanks> words;
  for (Mask m = lanes; m; m &= m - 1) {
    const auto first = uint64_t(p[__builtin_ctz(m)] - base);
    for (uint64_t n = first / kBankBytes; n <= (first + bytes - 1) / kBankBytes; ++n) {
      auto& bank = words[n % kBanks];
      if (std::find(bank.begin(), bank.end(), n) == bank.end()) bank.push_back(n);
    }
  }
  uint64_t most = 0;
  for (const auto& bank : words) most = std::max<uint64_t>(most, bank.size());
  return most;
}

// Accesses of 8 bytes are done by half a warp at a time, of 16 bytes by a quarter.
void add_wavefronts(Counts& c, Mask lanes, char* const* p, size_t bytes, const char* base) {
  const int width = bytes <= 4 ? 32 : bytes <= 8 ? 16 : bytes <= 16 ? 8 : 4;
  for (int first = 0; first < kLanes; first += width) {
    const Mask part = width == 32 ? lanes : lanes & (((1u << width) - 1) << first);
    if (!part) continue;
    c.parts += wavefronts_of(part, p, bytes, base);
    ++c.ideal;
  }
}

}  // namespace

void count_request(Warp& w, const Instruction& i, Mask lanes, char* const* p, size_t bytes,
                   Access kind) {
  Profile& profile = *w.block->profile;
  const bool shared = i.space == Space::shared ||
                      (i.space == Space::generic && w.is_shared(p[__builtin_ctz(lanes)]));
  const bool both = kind.reads && kind.writes;
  Counts& c = shared ? (both          ? profile.shared_atomic
                        : kind.writes ? profile.shared_store
                                      : profile.shared_load)
                     : (both          ? profile.global_atomic
                        : kind.writes ? profile.global_store
                                      : profile.global_load);
  ++c.requests;
  const uint64_t useful = different_bytes(lanes, p, bytes);
  c.bytes += useful;
  if (shared) return add_wavefronts(c, lanes, p, bytes, w.block->shared_base);
  c.parts += sectors(lanes, p, bytes);
  c.ideal += (useful + kSector - 1) / kSector;
}

}  // namespace ptx
