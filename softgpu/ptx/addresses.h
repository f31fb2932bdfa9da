// SPDX-License-Identifier: Apache-2.0
// From addresses of PTX to those of the host.
#pragma once
#include "ptx/lanes.h"

namespace ptx {

[[noreturn]] void misaligned(u64 address, int lane, size_t bytes);
[[noreturn]] void outside_local(u64 offset, size_t bytes, size_t size);

// Where a lane's access is; checks alignment, and the bounds of shared and local memory.
inline char* pointer(Warp& w, const Instruction& i, const Operand& o, int lane, size_t bytes) {
  const u64 base = w.lane_value(o, lane) + u64(i.offset);
  const bool offset = i.space == Space::shared || i.space == Space::local;
  const u64 address = offset ? u32(base) : base;
  if (address & (bytes - 1)) misaligned(address, lane, bytes);
  if (i.space == Space::shared) return w.shared(u32(base), bytes);
  if (i.space == Space::local) {
    const size_t size = w.kernel->local;
    if (address + bytes > size) outside_local(address, bytes, size);
    return reinterpret_cast<char*>(&w.local[size_t(lane) * size + address]);
  }
  return reinterpret_cast<char*>(base);
}

}  // namespace ptx
