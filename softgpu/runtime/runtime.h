// SPDX-License-Identifier: Apache-2.0
// What nvcc put into a library: the facts of its kernels, and their PTX.
#pragma once
#include <map>
#include <memory>
#include <string>

#include "ptx/ptx.h"

namespace softgpu {

// What ptxas found out about a kernel.
struct KernelFacts {
  int registers = 32;
  int static_shared = 0;
  int max_threads = 0;      // __launch_bounds__; 0: none
  int parameter_bytes = 0;  // 0: not known
};

// A fat binary: per architecture a cubin and PTX. Compressed parts are not read
// (nvcc --compress-mode=none).
class Image {
 public:
  // capability: 10 * major + minor of the device that the kernels are to run on
  Image(const void* wrapper, int capability) : wrapper_(wrapper), capability_(capability) {}
  const KernelFacts& facts(const std::string& kernel) const;
  // What the device would run: of the architectures that it understands, the newest; null if none.
  ptx::Module* module() const;
  std::string what_is_missing() const;

 private:
  void parse() const;
  const void* wrapper_;
  int capability_;
  mutable bool parsed_ = false, compressed_ = false;
  mutable std::map<std::string, KernelFacts> facts_;
  mutable std::unique_ptr<ptx::Module> module_;
  mutable std::string targets_;
};

}  // namespace softgpu
