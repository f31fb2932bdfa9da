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

// A fat binary: cubins and PTX of some architectures. Read when it is first asked for something.
// Compressed parts are not read (nvcc --compress-mode=none).
class Image {
 public:
  // capability: 10 * major + minor of the device that the kernels are to run on
  Image(const void* wrapper, int capability) : wrapper_(wrapper), capability_(capability) {}

  // The PTX of what the device would run: a cubin of its own major capability, or PTX, which the
  // driver compiles. Null if it would run none, or one whose PTX is not there.
  ptx::Module* module() const;
  std::string what_is_missing() const;

  // Of a kernel; from the cubin of the same architecture as the PTX. Without one from the PTX,
  // which knows no registers.
  const KernelFacts& facts(const std::string& kernel) const;

  int binary_version() const { return parse(), binary_version_; }
  int ptx_version() const { return parse(), architecture_; }

 private:
  void parse() const;
  const void* wrapper_;
  int capability_;
  mutable bool parsed_ = false;
  mutable int architecture_ = 0, binary_version_ = 0;
  mutable std::map<std::string, KernelFacts> facts_;
  mutable std::unique_ptr<ptx::Module> module_;
  mutable std::string missing_;
};

}  // namespace softgpu
