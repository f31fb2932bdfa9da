// SPDX-License-Identifier: Apache-2.0
// The memory of the devices: host memory, in a range of addresses of each device. An address is
// used for one allocation only, and a page that cannot be touched lies between two of them.
#pragma once
#include <cstddef>
#include <string>

namespace softgpu {

struct Allocation {
  char* begin;
  size_t bytes;  // asked for
  char* pages;   // around it, with slack before and behind
  size_t mapped;
  int device;
  bool live;
  char* end() const { return begin + bytes; }
};

// The device whose memory an address lies in, or -1.
int device_of(const void* p);
// The live allocation that an address points into, or null.
const Allocation* allocation_at(const void* p);
// Says where an address lies: "12 bytes past an allocation of 400 bytes"; "" where no device is.
std::string place_of(const void* p);
// Whether something wrote to the slack around an allocation; says it on stderr, once for each.
bool damaged(const Allocation& a, const char* by);
// Page-locked memory of the host.
bool is_pinned(const void* p);

}  // namespace softgpu
