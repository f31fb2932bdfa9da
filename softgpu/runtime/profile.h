// SPDX-License-Identifier: Apache-2.0
// What a GPU offers: the limits that the runtime applies, and what it says of itself.
#pragma once
#include <cstddef>
#include <string_view>

namespace softgpu {

// What is the same on every GPU of compute capability 8.0 and later.
constexpr int kWarp = 32, kThreadsPerBlock = 1024, kRegisters = 65536, kRegistersPerThread = 255;
constexpr int kSharedPerBlock = 48 << 10;  // without opting in
constexpr int kSharedReserved = 1 << 10;   // by the system, of each block's
constexpr int kParameterBytes = 32764;     // 4,096 before CUDA 12.1, or below capability 7.0
constexpr unsigned kGridX = 2147483647, kGridYZ = 65535, kBlockZ = 64;

struct Profile {
  std::string_view name;  // of SOFTGPU_GPU
  const char* full_name;  // of the device's properties
  int capability;         // 10 * major + minor
  int multiprocessors;
  int shared_per_sm;  // bytes; a block can opt in to all but what is reserved of it
  int threads_per_sm, blocks_per_sm;
  size_t memory_gib;
  int l2_mib, clock_mhz, memory_clock_mhz, memory_bus_bits;

  int shared_optin() const { return shared_per_sm - kSharedReserved; }
};

// Null if no GPU of this name is known; names() are those that are, for a message.
const Profile* find_profile(std::string_view name);
const char* profile_names();

}  // namespace softgpu
