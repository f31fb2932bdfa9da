// SPDX-License-Identifier: Apache-2.0
#include "runtime/settings.h"

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>

namespace softgpu {
namespace {

const char* text(const char* name, const char* otherwise) {
  const char* value = getenv(name);
  return value && *value ? value : otherwise;
}

// A whole number from `least`; a mistyped one ends the program, as would be hard to see otherwise.
long number(const char* name, long otherwise, long least) {
  const char* value = text(name, nullptr);
  if (!value) return otherwise;
  char* end;
  const long result = strtol(value, &end, 10);
  if (*end || result < least) {
    fprintf(stderr, "softgpu: %s=%s is not a whole number from %ld\n", name, value, least);
    _Exit(1);
  }
  return result;
}

// CUDA_VISIBLE_DEVICES says how many devices are left, not which: they are all alike.
int visible(int devices) {
  const char* chosen = getenv("CUDA_VISIBLE_DEVICES");
  if (!chosen) return devices;
  return *chosen ? std::min(devices, int(1 + std::count(chosen, chosen + strlen(chosen), ','))) : 0;
}

Settings from_environment() {
  Settings s;
  const char* name = text("SOFTGPU_GPU", "h100");
  s.gpu = find_profile(name);
  if (!s.gpu) {
    fprintf(stderr, "softgpu: SOFTGPU_GPU=%s is none of %s\n", name, profile_names());
    _Exit(1);
  }
  s.devices = visible(int(std::min(number("SOFTGPU_DEVICES", 1, 0), long(kMaxDevices))));
  s.multiprocessors = int(number("SOFTGPU_SMS", s.gpu->multiprocessors, 1));
  s.memory = size_t(number("SOFTGPU_MEMORY_GIB", long(s.gpu->memory_gib), 1)) << 30;
  s.poison = number("SOFTGPU_POISON", 1, 0);
  s.stream_check = number("SOFTGPU_STREAM_CHECK", 0, 0);
  return s;
}

}  // namespace

const Settings& settings() {
  static const Settings all = from_environment();
  return all;
}

}  // namespace softgpu
