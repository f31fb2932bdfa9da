// SPDX-License-Identifier: Apache-2.0
// What the devices say of themselves.
#include <climits>
#include <cstdio>

#include "runtime/core.h"
#include "runtime/settings.h"

using namespace softgpu;

namespace {

bool exists(int device) { return device >= 0 && device < settings().devices; }

cudaError_t no_device(const char* call, int device) {
  return refuse(cudaErrorInvalidDevice, "%s: device %d of %d", call, device, settings().devices);
}

}  // namespace

SOFTGPU_API cudaRuntimeGetVersion(int* v) { return *v = CUDART_VERSION, cudaSuccess; }
SOFTGPU_API cudaDriverGetVersion(int* v) { return *v = CUDART_VERSION, cudaSuccess; }

SOFTGPU_API cudaGetDeviceCount(int* n) {
  *n = settings().devices;
  return *n ? cudaSuccess : done(cudaErrorNoDevice);
}
SOFTGPU_API cudaGetDevice(int* d) { return *d = me.device, cudaSuccess; }
SOFTGPU_API cudaSetDevice(int d) {
  if (!exists(d)) return no_device("cudaSetDevice", d);
  me.device = d;
  return cudaSuccess;
}

SOFTGPU_API cudaGetDeviceProperties(cudaDeviceProp* p, int d) {
  if (!exists(d)) return no_device("cudaGetDeviceProperties", d);
  const Profile& gpu = *settings().gpu;
  *p = {};
  snprintf(p->name, sizeof p->name, "%s", gpu.full_name);
  p->uuid.bytes[0] = char(d + 1);
  p->major = gpu.capability / 10;
  p->minor = gpu.capability % 10;
  p->multiProcessorCount = settings().multiprocessors;
  p->totalGlobalMem = settings().memory;
  p->l2CacheSize = gpu.l2_mib << 20;
  p->memoryBusWidth = gpu.memory_bus_bits;
  p->sharedMemPerBlock = kSharedPerBlock;
  p->sharedMemPerBlockOptin = size_t(gpu.shared_optin());
  p->sharedMemPerMultiprocessor = size_t(gpu.shared_per_sm);
  p->reservedSharedMemPerBlock = kSharedReserved;
  p->regsPerBlock = p->regsPerMultiprocessor = kRegisters;
  p->warpSize = kWarp;
  p->maxThreadsPerBlock = kThreadsPerBlock;
  p->maxThreadsPerMultiProcessor = gpu.threads_per_sm;
  p->maxBlocksPerMultiProcessor = gpu.blocks_per_sm;
  p->maxThreadsDim[0] = p->maxThreadsDim[1] = kThreadsPerBlock;
  p->maxThreadsDim[2] = int(kBlockZ);
  p->maxGridSize[0] = int(kGridX);
  p->maxGridSize[1] = p->maxGridSize[2] = int(kGridYZ);
  p->totalConstMem = 65536;
  p->memPitch = INT_MAX;
  p->textureAlignment = 512;
  p->unifiedAddressing = p->concurrentKernels = p->canMapHostMemory = 1;
  p->asyncEngineCount = 2;
  p->pciBusID = d + 1;
  return cudaSuccess;
}

SOFTGPU_API cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int d) {
  cudaDeviceProp p;
  if (cudaError_t error = cudaGetDeviceProperties(&p, d)) return error;
  const auto found = [&]() -> long {
    switch (attribute) {
      case cudaDevAttrComputeCapabilityMajor:
        return p.major;
      case cudaDevAttrComputeCapabilityMinor:
        return p.minor;
      case cudaDevAttrMultiProcessorCount:
        return p.multiProcessorCount;
      case cudaDevAttrMaxSharedMemoryPerBlock:
        return long(p.sharedMemPerBlock);
      case cudaDevAttrMaxSharedMemoryPerBlockOptin:
        return long(p.sharedMemPerBlockOptin);
      case cudaDevAttrMaxSharedMemoryPerMultiprocessor:
        return long(p.sharedMemPerMultiprocessor);
      case cudaDevAttrReservedSharedMemoryPerBlock:
        return long(p.reservedSharedMemPerBlock);
      case cudaDevAttrMaxRegistersPerBlock:
        return p.regsPerBlock;
      case cudaDevAttrMaxRegistersPerMultiprocessor:
        return p.regsPerMultiprocessor;
      case cudaDevAttrWarpSize:
        return p.warpSize;
      case cudaDevAttrMaxThreadsPerBlock:
        return p.maxThreadsPerBlock;
      case cudaDevAttrMaxThreadsPerMultiProcessor:
        return p.maxThreadsPerMultiProcessor;
      case cudaDevAttrMaxBlocksPerMultiprocessor:
        return p.maxBlocksPerMultiProcessor;
      case cudaDevAttrMaxBlockDimX:
      case cudaDevAttrMaxBlockDimY:
        return p.maxThreadsDim[0];
      case cudaDevAttrMaxBlockDimZ:
        return p.maxThreadsDim[2];
      case cudaDevAttrMaxGridDimX:
        return p.maxGridSize[0];
      case cudaDevAttrMaxGridDimY:
      case cudaDevAttrMaxGridDimZ:
        return p.maxGridSize[1];
      case cudaDevAttrL2CacheSize:
        return p.l2CacheSize;
      case cudaDevAttrClockRate:
        return settings().gpu->clock_mhz * 1000L;
      case cudaDevAttrMemoryClockRate:
        return settings().gpu->memory_clock_mhz * 1000L;
      case cudaDevAttrGlobalMemoryBusWidth:
        return p.memoryBusWidth;
      case cudaDevAttrUnifiedAddressing:
      case cudaDevAttrConcurrentKernels:
        return 1;
      case cudaDevAttrMemoryPoolsSupported:
      case cudaDevAttrCooperativeLaunch:
      case cudaDevAttrClusterLaunch:
      case cudaDevAttrManagedMemory:
      case cudaDevAttrPageableMemoryAccess:
      case cudaDevAttrConcurrentManagedAccess:
      case cudaDevAttrHostRegisterSupported:
      case cudaDevAttrIntegrated:
      case cudaDevAttrComputeMode:
      case cudaDevAttrEccEnabled:
        return 0;
      default:
        return -1;
    }
  }();
  if (found < 0) {
    return refuse(cudaErrorNotSupported, "the software GPU does not provide device attribute %d",
                  int(attribute));
  }
  *value = int(found);
  return cudaSuccess;
}

SOFTGPU_API cudaDeviceGetPCIBusId(char* text, int n, int d) {
  if (!exists(d)) return no_device("cudaDeviceGetPCIBusId", d);
  snprintf(text, size_t(n), "0000:%02x:00.0", d + 1);
  return cudaSuccess;
}
SOFTGPU_API cudaDeviceGetStreamPriorityRange(int* least, int* greatest) {
  if (least) *least = 0;
  if (greatest) *greatest = -5;
  return cudaSuccess;
}
SOFTGPU_API cudaDeviceCanAccessPeer(int* can, int, int) { return *can = 0, cudaSuccess; }
SOFTGPU_API cudaProfilerStart() { return cudaSuccess; }
SOFTGPU_API cudaProfilerStop() { return cudaSuccess; }

// Of the driver, what torch asks for through the runtime: nothing is there, which torch can do
// with.
SOFTGPU_API cudaGetDriverEntryPointByVersion(const char*, void** function, unsigned,
                                             unsigned long long,
                                             cudaDriverEntryPointQueryResult* result) {
  *function = nullptr;
  if (result) *result = cudaDriverEntryPointSymbolNotFound;
  return cudaSuccess;
}
