// SPDX-License-Identifier: Apache-2.0
// The kernels that libraries register, and what a device can hold of each.
#pragma once
#include <string>

#include "runtime/core.h"
#include "runtime/image.h"
#include "runtime/settings.h"

namespace softgpu {

struct Kernel {
  std::string name;       // mangled
  std::string demangled;  // for messages
  const Image* image;
  int max_dynamic[kMaxDevices];  // MaxDynamicSharedMemorySize; < 0: not set

  const KernelFacts& facts() const { return image->facts(name); }
  int max_threads() const;
  int dynamic_limit() const;  // bytes of dynamic shared memory that a launch may ask for now
};

// By the address of the host's stub, or by the cudaKernel_t that __cudaGetKernel gave; null, and
// the reason on stderr, where there is none.
Kernel* kernel_of(const void* function, const char* call);

// Why a launch is refused before anything runs; says so.
cudaError_t check_launch(const Kernel& k, dim3 grid, dim3 block, size_t smem);

// Blocks that one multiprocessor holds at once.
int resident_blocks(const Kernel& k, int threads, size_t smem);

}  // namespace softgpu
