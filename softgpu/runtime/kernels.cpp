// SPDX-License-Identifier: Apache-2.0
#include "runtime/kernels.h"

#include <cxxabi.h>

#include <algorithm>
#include <cstdlib>
#include <map>

namespace softgpu {
namespace {

// How a multiprocessor hands out what it has (compute capability 8.0 and later).
constexpr int kRegisterUnit = 256;  // of a warp
constexpr int kSharedUnit = 128;    // bytes of a block
constexpr int kPartitions = 4;      // each with its own registers, and its share of a block's warps

std::map<const void*, Kernel*> kernels;  // by the host's stub

std::string demangle(const std::string& name) {
  char* text = abi::__cxa_demangle(name.c_str(), nullptr, nullptr, nullptr);
  std::string result = text ? text : name;
  free(text);
  return result;
}

int round_up(int value, int unit) { return (value + unit - 1) / unit * unit; }

int warps_of_block(int threads) { return round_up(round_up(threads, kWarp) / kWarp, kPartitions); }
int registers_of_warp(const KernelFacts& f) {
  return round_up(std::max(f.registers, 1) * kWarp, kRegisterUnit);
}

}  // namespace

int Kernel::max_threads() const {
  const int compiled_for = facts().max_threads;
  return compiled_for ? compiled_for : kThreadsPerBlock;
}

int Kernel::dynamic_limit() const {
  const int set = max_dynamic[me.device];
  return set >= 0 ? set : kSharedPerBlock - facts().static_shared;
}

Kernel* kernel_of(const void* function, const char* call) {
  const auto found = kernels.find(function);
  if (found != kernels.end()) return found->second;
  for (const auto& [stub, kernel] : kernels) {
    if (kernel == function) return kernel;
  }
  refuse(cudaErrorInvalidDeviceFunction, "%s: %p is no kernel", call, function);
  return nullptr;
}

cudaError_t check_launch(const Kernel& k, dim3 grid, dim3 block, size_t smem) {
  const KernelFacts& f = k.facts();
  const char* name = k.demangled.c_str();
  const size_t threads = size_t(block.x) * block.y * block.z;
  if (!threads || threads > kThreadsPerBlock || block.z > kBlockZ) {
    return refuse(cudaErrorInvalidConfiguration,
                  "%s: a block of %u x %u x %u threads; 1 to %d are possible", name, block.x,
                  block.y, block.z, kThreadsPerBlock);
  }
  if (!grid.x || !grid.y || !grid.z || grid.x > kGridX || grid.y > kGridYZ || grid.z > kGridYZ) {
    return refuse(cudaErrorInvalidConfiguration,
                  "%s: a grid of %u x %u x %u blocks; %u x %u x %u are possible", name, grid.x,
                  grid.y, grid.z, kGridX, kGridYZ, kGridYZ);
  }
  if (threads > size_t(k.max_threads())) {
    return refuse(cudaErrorInvalidValue, "%s: %zu threads, compiled for %d (__launch_bounds__)",
                  name, threads, k.max_threads());
  }
  if (smem > size_t(k.dynamic_limit())) {
    return refuse(cudaErrorInvalidValue,
                  "%s: %zu bytes of dynamic shared memory, its limit is %d; %d are static", name,
                  smem, k.dynamic_limit(), f.static_shared);
  }
  if (const int warps = warps_of_block(int(threads)); registers_of_warp(f) * warps > kRegisters) {
    return refuse(cudaErrorLaunchOutOfResources,
                  "%s: %zu threads of %d registers; a multiprocessor has %d registers", name,
                  threads, f.registers, kRegisters);
  }
  return cudaSuccess;
}

int resident_blocks(const Kernel& k, int threads, size_t smem) {
  const KernelFacts& f = k.facts();
  const Profile& gpu = *settings().gpu;
  if (threads <= 0 || threads > k.max_threads() || smem > size_t(k.dynamic_limit())) return 0;
  const int warps = warps_of_block(threads);
  const int shared = round_up(int(smem) + f.static_shared + kSharedReserved, kSharedUnit);
  const int warps_by_registers = kRegisters / kPartitions / registers_of_warp(f) * kPartitions;
  return std::min({gpu.blocks_per_sm, gpu.threads_per_sm / kWarp / warps,
                   gpu.shared_per_sm / shared, warps_by_registers / warps});
}

}  // namespace softgpu

using namespace softgpu;

// ---- attributes

SOFTGPU_API cudaFuncGetAttributes(cudaFuncAttributes* a, const void* function) {
  Lock lock(mutex);
  const Kernel* k = kernel_of(function, "cudaFuncGetAttributes");
  if (!k) return me.last;
  if (!k->image->module()) {
    return refuse(cudaErrorNoKernelImageForDevice, "%s: %s", k->demangled.c_str(),
                  k->image->what_is_missing().c_str());
  }
  *a = {};
  a->sharedSizeBytes = size_t(k->facts().static_shared);
  a->numRegs = k->facts().registers;
  a->maxThreadsPerBlock = k->max_threads();
  a->binaryVersion = k->image->binary_version();
  a->ptxVersion = k->image->ptx_version();
  a->maxDynamicSharedSizeBytes = k->dynamic_limit();
  a->preferredShmemCarveout = -1;
  return cudaSuccess;
}

SOFTGPU_API cudaFuncSetAttribute(const void* function, cudaFuncAttribute attribute, int value) {
  Lock lock(mutex);
  Kernel* k = kernel_of(function, "cudaFuncSetAttribute");
  if (!k) return me.last;
  if (attribute == cudaFuncAttributePreferredSharedMemoryCarveout) return cudaSuccess;
  if (attribute != cudaFuncAttributeMaxDynamicSharedMemorySize) {
    return softgpu_not_provided("this attribute of cudaFuncSetAttribute");
  }
  const int left = settings().gpu->shared_optin() - k->facts().static_shared;
  if (value < 0 || value > left) {
    return refuse(cudaErrorInvalidValue,
                  "%s: MaxDynamicSharedMemorySize %d, but %d bytes of static shared memory leave "
                  "%d",
                  k->demangled.c_str(), value, k->facts().static_shared, left);
  }
  k->max_dynamic[me.device] = value;
  return cudaSuccess;
}

SOFTGPU_API cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int* blocks,
                                                                   const void* function,
                                                                   int threads, size_t smem,
                                                                   unsigned) {
  Lock lock(mutex);
  const Kernel* k = kernel_of(function, "cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags");
  if (!k) return me.last;
  *blocks = resident_blocks(*k, threads, smem);
  note("occupancy blocks=%d threads=%d smem=%zu static=%d registers=%d kernel=%s", *blocks, threads,
       smem, k->facts().static_shared, k->facts().registers, k->demangled.c_str());
  return cudaSuccess;
}
SOFTGPU_API cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, const void* function,
                                                          int threads, size_t smem) {
  return cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(blocks, function, threads, smem, 0);
}

// ---- what nvcc puts into every object with device code

SOFTGPU_API __cudaGetKernel(cudaKernel_t* out, const void* function) {
  Lock lock(mutex);
  *out = reinterpret_cast<cudaKernel_t>(kernel_of(function, "__cudaGetKernel"));
  return *out ? cudaSuccess : me.last;
}
extern "C" void** __cudaRegisterFatBinary(void* wrapper) {
  return reinterpret_cast<void**>(new Image(wrapper, settings().gpu->capability));
}
extern "C" void __cudaRegisterFatBinaryEnd(void**) {}
extern "C" void __cudaUnregisterFatBinary(void**) {}  // at the end of the process
extern "C" char __cudaInitModule(void**) { return 1; }
extern "C" void __cudaRegisterFunction(void** image, const char* stub, char*, const char* name, int,
                                       uint3*, uint3*, dim3*, dim3*, int*) {
  Lock lock(mutex);
  auto* k = new Kernel{name, demangle(name), reinterpret_cast<Image*>(image), {}};
  std::fill(std::begin(k->max_dynamic), std::end(k->max_dynamic), -1);
  kernels[stub] = k;
}
extern "C" void __cudaRegisterVar(void**, char*, char*, const char*, int, size_t, int, int) {}
