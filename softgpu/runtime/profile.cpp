// SPDX-License-Identifier: Apache-2.0
// The limits are those of the CUDA C++ Programming Guide, "Technical Specifications per Compute
// Capability"; products (multiprocessors, memory, L2, clocks) those of NVIDIA's data sheets. Clocks
// are only shown: nothing here takes the time that a GPU would.
#include "runtime/profile.h"

#include <string>

namespace softgpu {
namespace {

constexpr int kKiB = 1024;

// clang-format off
constexpr Profile kProfiles[] = {
    // name      in full                              sm  SMs  shared/SM   threads blocks GiB  L2 MHz   memory: MHz, bits
    {"h100",    "softgpu H100 (host memory)",          90, 132, 228 * kKiB, 2048,   32,    80,  50, 1980, 2619, 5120},
    {"h200",    "softgpu H200 (host memory)",          90, 132, 228 * kKiB, 2048,   32,   141,  50, 1980, 3201, 6144},
    {"a100",    "softgpu A100 (host memory)",          80, 108, 164 * kKiB, 2048,   32,    80,  40, 1410, 1593, 5120},
    {"rtx3090", "softgpu RTX 3090 (host memory)",      86,  82, 100 * kKiB, 1536,   16,    24,   6, 1695, 9751,  384},
    {"l40s",    "softgpu L40S (host memory)",          89, 142, 100 * kKiB, 1536,   24,    48,  96, 2520, 9001,  384},
    {"b200",    "softgpu B200 (host memory)",         100, 148, 228 * kKiB, 2048,   32,   180, 126, 1965, 3996, 8192},
    {"rtx5090", "softgpu RTX 5090 (host memory)",     120, 170, 100 * kKiB, 1536,   24,    32,  96, 2407, 14001, 512},
};
// clang-format on

}  // namespace

const Profile* find_profile(std::string_view name) {
  for (const Profile& p : kProfiles) {
    if (p.name == name) return &p;
  }
  return nullptr;
}

const char* profile_names() {
  static const std::string names = [] {
    std::string all;
    for (const Profile& p : kProfiles) all.append(all.empty() ? "" : ", ").append(p.name);
    return all;
  }();
  return names.c_str();
}

}  // namespace softgpu
