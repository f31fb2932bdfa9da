// SPDX-License-Identifier: Apache-2.0
// The SOFTGPU_* variables of the runtime, read once. README.md has the table.
#pragma once
#include "runtime/profile.h"

namespace softgpu {

constexpr int kMaxDevices = 8;

struct Settings {
  const Profile* gpu;
  int devices;  // that CUDA_VISIBLE_DEVICES leaves
  int multiprocessors;
  size_t memory;  // bytes of each device
  bool poison, stream_check;
};

const Settings& settings();

}  // namespace softgpu
