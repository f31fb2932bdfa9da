// SPDX-License-Identifier: Apache-2.0
// cp.async: copies land as late as they may, at once, or at random.
#include "ptx/addresses.h"
#include "ptx/opcode.h"

namespace ptx {
namespace {

void land(Warp& w, int l, const Copy& c) {
  char* to = w.shared(c.to, c.bytes);
  w.touch(l, to, c.bytes, kWrite);
  if (c.read) w.touch(l, c.from, c.read, kRead);
  memset(to, 0, c.bytes);
  memcpy(to, c.from, c.read);
}
void land_first(Warp& w, int l, size_t n) {
  auto& copies = w.copies[l];
  for (size_t c = 0; c < n; ++c)
    if (copies[c].bytes) land(w, l, copies[c]);
  copies.erase(copies.begin(), copies.begin() + long(n));
}

bool lands_now(Warp& w) {
  const Async when = w.block->options->async;
  return when == Async::early || (when == Async::random && w.block->random() % 2);
}

void cp_async(Warp& w, const Instruction& i) {
  char *to_shared[kLanes], *from_global[kLanes];
  size_t bytes = 0;
  Mask reading = 0;
  each(w.mask, [&](int l) {
    bytes = take<u32>(w, i.o[2], l);
    const u32 read = i.o.size() > 3 && !i.mode ? take<u32>(w, i.o[3], l) : u32(bytes);
    const u32 to = u32(w.lane_value(i.o[0], l) + u64(i.offset));
    const u64 from = w.lane_value(i.o[1], l) + u64(i.offset2);
    if (to % bytes || (read && from % bytes)) throw Error("cp.async: misaligned address");
    if (read > bytes) throw Error("cp.async: reads more than it writes");
    to_shared[l] = w.shared(to, bytes);
    from_global[l] = reinterpret_cast<char*>(from);
    reading |= Mask(read != 0) << l;
    Copy copy{to, from_global[l], u32(bytes), read};
    if (lands_now(w)) {
      land(w, l, copy);
      copy.bytes = 0;  // keeps its place in its group
    }
    w.copies[l].push_back(copy);
  });
  if (!w.block->profile) return;
  Instruction part = i;
  part.space = Space::global;
  if (reading) count_request(w, part, reading, from_global, bytes, kRead);
  part.space = Space::shared;
  count_request(w, part, w.mask, to_shared, bytes, kWrite);
}

void commit(Warp& w, const Instruction&) {
  each(w.mask, [&](int l) { w.groups[l].push_back(w.copies[l].size()); });
}

// mode: all copies (1), or all but those of the last groups.
void wait(Warp& w, const Instruction& i) {
  const size_t keep = i.mode ? 0 : take<u32>(w, i.o[0], 0);
  each(w.mask, [&](int l) {
    auto& groups = w.groups[l];
    const size_t ready = groups.size() > keep ? groups.size() - keep : 0;
    const size_t n = i.mode ? w.copies[l].size() : ready ? groups[ready - 1] : 0;
    groups.erase(groups.begin(), groups.begin() + long(ready));
    for (size_t& g : groups) g -= n;
    land_first(w, l, n);
  });
}

}  // namespace

Handler async_copy(const Opcode& op, Instruction& i) {
  if (!op.has("async")) return nullptr;
  i.outputs = 0;
  const std::string_view what = op.one_of({"commit_group", "wait_group", "wait_all", "ca", "cg"});
  i.mode = what == "wait_all";
  if (what == "commit_group") return &commit;
  if (what.starts_with("wait")) return &wait;
  // A fourth operand is the bytes to read, but for a cache's policy.
  i.mode = op.has("L2::cache_hint") && i.o.size() == 4;
  op.allow({"shared", "shared::cta", "global", "L2::64B", "L2::128B", "L2::256B"});
  return what == "ca" || what == "cg" ? &cp_async : nullptr;
}

}  // namespace ptx
