// SPDX-License-Identifier: Apache-2.0
// libcudart.so.13 without a GPU: devices are made of host memory, work runs when it is submitted.
// What a kernel does is not known here: kernels.cpp brings the project's, compiled for the host.
// Rules of launches and attributes are those of the CUDA documentation, for an H100.
#include "runtime/runtime.h"

#include <cuda_runtime_api.h>
#include <cxxabi.h>
#include <sys/mman.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <mutex>
#include <set>
#include <string>
#include <thread>
#include <utility>
#include <vector>

using Work = std::function<cudaError_t()>;

// ---- the device

namespace {

long setting(const char* name, long otherwise) {
  const char* text = getenv(name);
  return text && *text ? atol(text) : otherwise;
}

int visible_devices() {
  const int all = int(std::min(setting("SOFTGPU_DEVICES", 1), 8L));
  const char* chosen = getenv("CUDA_VISIBLE_DEVICES");  // how many, not which
  if (!chosen) return all;
  return *chosen ? std::min(all, int(1 + std::count(chosen, chosen + strlen(chosen), ','))) : 0;
}
const int kDevices = visible_devices();
const int kMultiprocessors = int(setting("SOFTGPU_SMS", 132));
const size_t kMemory = size_t(setting("SOFTGPU_MEMORY_GIB", 80)) << 30;
constexpr int kSharedPerBlock = 48 << 10, kSharedOptin = 227 << 10, kSharedPerSm = 228 << 10;
constexpr int kSharedReserved = 1 << 10;  // of each block
constexpr int kRegisters = 65536, kWarp = 32, kThreadsPerBlock = 1024, kThreadsPerSm = 2048;
constexpr int kBlocksPerSm = 32;

std::recursive_mutex mutex;
using Lock = std::lock_guard<std::recursive_mutex>;

struct Thread {
  int device = 0;
  cudaError_t last = cudaSuccess;
  cudaStreamCaptureMode capture_mode = cudaStreamCaptureModeGlobal;
  struct Call {
    dim3 grid, block;
    size_t smem;
    cudaStream_t stream;
  };
  std::vector<Call> calls;  // of <<<>>>
};
thread_local Thread me;

cudaError_t done(cudaError_t error) {
  if (error != cudaSuccess) me.last = error;
  return error;
}

// Says on stderr why, as an error code alone does not.
__attribute__((format(printf, 2, 3))) cudaError_t refuse(cudaError_t error, const char* format,
                                                         ...) {
  char text[2048];
  va_list list;
  va_start(list, format);
  vsnprintf(text, sizeof text, format, list);
  va_end(list);
  fprintf(stderr, "softgpu: %s: %s\n", cudaGetErrorName(error), text);
  return done(error);
}

// ---- the log: what a test wants to know of the calls that were made

bool logging = false;
std::string log_text;

__attribute__((format(printf, 1, 2))) void note(const char* format, ...) {
  if (!logging) return;
  char text[2048];
  va_list list;
  va_start(list, format);
  vsnprintf(text, sizeof text, format, list);
  va_end(list);
  Lock lock(mutex);
  log_text += text;
  log_text += '\n';
}

}  // namespace

// ---- streams, events, graphs

struct CUgraph_st {
  std::vector<Work> nodes;
  bool valid = true;
  unsigned long long id = 0;
};
struct CUgraphExec_st {
  std::vector<Work> nodes;
};
struct CUstream_st {
  int device = 0, number = 0, priority = 0;
  CUgraph_st* capture = nullptr;
  bool origin = false;  // of the capture
};
struct CUevent_st {
  int device = 0;
  std::chrono::steady_clock::time_point time;
  CUgraph_st* capture = nullptr;
  bool timing = true, recorded = false;
};

namespace {

std::set<CUstream_st*> streams;
CUstream_st default_streams[64];

// Null, 1 and 2 stand for the current device's default streams.
CUstream_st& stream_of(cudaStream_t stream) {
  if (uintptr_t(stream) > 2) return *stream;
  default_streams[me.device].device = me.device;
  return default_streams[me.device];
}

// Runs work that was submitted to a stream, or keeps it for the graph that the stream captures.
cudaError_t submit(cudaStream_t stream, Work work) {
  CUstream_st& s = stream_of(stream);
  if (s.capture) {
    s.capture->nodes.push_back(std::move(work));
    return cudaSuccess;
  }
  return work();
}

bool any_capture() {
  return std::any_of(streams.begin(), streams.end(), [](auto* s) { return s->capture; });
}

// Calls that wait, which a capture does not allow.
cudaError_t wait_for(const char* what, CUgraph_st* capture) {
  if (!capture) return cudaSuccess;
  capture->valid = false;
  return refuse(cudaErrorStreamCaptureUnsupported, "%s while the stream is captured", what);
}

cudaError_t wait_for_all(const char* what) {
  if (me.capture_mode == cudaStreamCaptureModeRelaxed) return cudaSuccess;
  for (auto* s : streams) {
    if (s->capture) return wait_for(what, s->capture);
  }
  return cudaSuccess;
}

// ---- memory: a range of addresses a device, used once, with a page between two allocations

constexpr size_t kArena = size_t(8) << 40, kPage = 4096;
struct Allocation {
  size_t bytes, mapped;
};
struct Arena {
  char* base = nullptr;
  size_t next = kPage;
  size_t used = 0;
  std::map<char*, Allocation> live;
};
Arena arenas[8];
std::map<char*, size_t> pinned;

int device_of(const void* p) {
  auto c = static_cast<const char*>(p);
  for (int d = 0; d < kDevices; ++d) {
    if (arenas[d].base && c >= arenas[d].base && c < arenas[d].base + kArena) return d;
  }
  return -1;
}

// The last byte of an allocation is near the end of its last page (256 bytes are an allocation's
// alignment), so that most accesses past it fault.
cudaError_t allocate(void** out, size_t bytes) {
  Lock lock(mutex);
  *out = nullptr;
  if (bytes == 0) return cudaSuccess;
  Arena& a = arenas[me.device];
  if (!a.base) {
    void* m = mmap(nullptr, kArena, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (m == MAP_FAILED) return refuse(cudaErrorMemoryAllocation, "no room for a device's memory");
    a.base = static_cast<char*>(m);
  }
  const size_t size = (bytes + 255) / 256 * 256, mapped = (size + kPage - 1) / kPage * kPage;
  if (a.used + size > kMemory) return done(cudaErrorMemoryAllocation);
  char* pages = a.base + a.next;
  if (mprotect(pages, mapped, PROT_READ | PROT_WRITE)) return done(cudaErrorMemoryAllocation);
  a.next += mapped + kPage;
  a.used += size;
  char* p = pages + mapped - size;
  if (setting("SOFTGPU_POISON", 1) && size <= size_t(64) << 20) memset(p, 0xff, size);
  a.live[p] = {size, mapped};
  *out = p;
  note("malloc device=%d bytes=%zu", me.device, bytes);
  return cudaSuccess;
}

cudaError_t release(void* p) {
  Lock lock(mutex);
  if (!p) return cudaSuccess;
  const int d = device_of(p);
  auto found = d < 0 ? decltype(arenas[0].live)::iterator{} : arenas[d].live.find((char*)p);
  if (d < 0 || found == arenas[d].live.end()) {
    return refuse(cudaErrorInvalidValue, "cudaFree of %p, which is no allocation", p);
  }
  char* pages = found->first + found->second.bytes - found->second.mapped;
  madvise(pages, found->second.mapped, MADV_DONTNEED);
  mprotect(pages, found->second.mapped, PROT_NONE);
  arenas[d].used -= found->second.bytes;
  arenas[d].live.erase(found);
  note("free device=%d", d);
  return cudaSuccess;
}

// Whether it points into an allocation.
bool is_live(const void* p) {
  const int d = device_of(p);
  if (d < 0) return false;
  auto c = static_cast<char*>(const_cast<void*>(p));
  auto after = arenas[d].live.upper_bound(c);
  if (after == arenas[d].live.begin()) return false;
  --after;
  return c < after->first + after->second.bytes;
}

bool is_pinned(const void* p) {
  auto c = static_cast<const char*>(p);
  auto after = pinned.upper_bound(const_cast<char*>(c));
  if (after == pinned.begin()) return false;
  --after;
  return c < after->first + after->second;
}

const char* copy_kind(const void* to, const void* from) {
  static const char* names[] = {"h2h", "h2d", "d2h", "d2d"};
  return names[2 * (device_of(from) >= 0) + (device_of(to) >= 0)];
}

cudaError_t copy(void* to, const void* from, size_t bytes, cudaStream_t stream, bool async) {
  Lock lock(mutex);
  CUstream_st& s = stream_of(stream);
  note("memcpy%s kind=%s bytes=%zu device=%d stream=%d pinned=%d", async ? "_async" : "",
       copy_kind(to, from), bytes, s.device, s.number, is_pinned(to) || is_pinned(from));
  if (!async) {
    if (cudaError_t error = wait_for_all("cudaMemcpy")) return error;
  }
  return submit(stream, [=] {
    memmove(to, from, bytes);
    return cudaSuccess;
  });
}

// ---- kernels

struct Kernel {
  std::string name;       // mangled, of the device's code
  std::string demangled;  // the same on both sides
  const softgpu::Image* image;
  int max_dynamic[8];  // of each device; < 0: not set
  const softgpu::KernelFacts& facts() const { return image->facts(name); }
  int dynamic_limit() const {
    const int set = max_dynamic[me.device];
    return set >= 0 ? set : kSharedPerBlock - facts().static_shared;
  }
};
std::map<const void*, Kernel*> kernels;  // by the address of the host's stub

std::string demangle(const std::string& name) {
  char* text = abi::__cxa_demangle(name.c_str(), nullptr, nullptr, nullptr);
  std::string result = text ? text : name;
  free(text);
  return result;
}

Kernel* kernel_of(const void* function) {
  auto found = kernels.find(function);
  if (found != kernels.end()) return found->second;
  for (auto& [stub, kernel] : kernels) {
    if (kernel == function) return kernel;  // a cudaKernel_t
  }
  return nullptr;
}

int round_up(int value, int unit) { return (value + unit - 1) / unit * unit; }
int registers_of_block(const softgpu::KernelFacts& f, int threads) {
  return round_up(threads, kWarp) / kWarp * round_up(f.registers * kWarp, 256);
}

// What the runtime refuses before anything runs.
cudaError_t check_launch(const Kernel& k, dim3 grid, dim3 block, size_t smem) {
  const auto& f = k.facts();
  const char* name = k.demangled.c_str();
  const size_t threads = size_t(block.x) * block.y * block.z;
  if (!threads || threads > kThreadsPerBlock || block.z > 64 || !grid.x || !grid.y || !grid.z ||
      grid.x > INT32_MAX || grid.y > 65535 || grid.z > 65535) {
    return refuse(cudaErrorInvalidConfiguration, "%s: grid (%u,%u,%u), block (%u,%u,%u)", name,
                  grid.x, grid.y, grid.z, block.x, block.y, block.z);
  }
  if (f.max_threads && threads > size_t(f.max_threads)) {
    return refuse(cudaErrorInvalidValue, "%s: %zu threads, compiled for %d", name, threads,
                  f.max_threads);
  }
  if (smem > size_t(k.dynamic_limit())) {
    return refuse(cudaErrorInvalidValue, "%s: %zu bytes of dynamic shared memory, limit %d", name,
                  smem, k.dynamic_limit());
  }
  if (smem + f.static_shared > kSharedOptin) {
    return refuse(cudaErrorInvalidValue, "%s: %zu + %d bytes of shared memory", name, smem,
                  f.static_shared);
  }
  if (registers_of_block(f, int(threads)) > kRegisters) {
    return refuse(cudaErrorLaunchOutOfResources, "%s: %zu threads of %d registers", name, threads,
                  f.registers);
  }
  return cudaSuccess;
}

int resident_blocks(const Kernel& k, int threads, size_t smem) {
  const auto& f = k.facts();
  if (threads <= 0 || threads > kThreadsPerBlock || (f.max_threads && threads > f.max_threads) ||
      smem > size_t(k.dynamic_limit())) {
    return 0;
  }
  const int shared = round_up(int(smem) + f.static_shared + kSharedReserved, 128);
  return std::min({kBlocksPerSm, kThreadsPerSm / round_up(threads, kWarp), kSharedPerSm / shared,
                   kRegisters / std::max(1, registers_of_block(f, threads))});
}

// The arguments as the device has them.
std::vector<char> argument_bytes(const ptx::Module& module, const std::string& name, void** args) {
  std::vector<char> bytes;
  int i = 0;
  for (const auto& [offset, size] : module.params(name)) {
    bytes.resize(offset + size);
    memcpy(bytes.data() + offset, args[i++], size);
  }
  return bytes;
}

cudaError_t launch(const void* function, dim3 grid, dim3 block, void** args, size_t smem,
                   cudaStream_t stream) {
  Lock lock(mutex);
  Kernel* k = kernel_of(function);
  if (!k) return refuse(cudaErrorInvalidDeviceFunction, "launch of an unknown function");
  CUstream_st& s = stream_of(stream);
  note(
      "launch device=%d stream=%d thread=%lu captured=%d grid=%u,%u,%u block=%u smem=%zu kernel=%s",
      me.device, s.number, std::hash<std::thread::id>{}(std::this_thread::get_id()) % 100000,
      s.capture != nullptr, grid.x, grid.y, grid.z, block.x * block.y * block.z, smem,
      k->demangled.c_str());
  if (s.device != me.device) {
    return refuse(cudaErrorInvalidResourceHandle, "%s: device %d is current, the stream is of %d",
                  k->demangled.c_str(), me.device, s.device);
  }
  ptx::Module* module = k->image->module();
  if (!module) {
    return refuse(cudaErrorNoKernelImageForDevice, "%s: %s", k->demangled.c_str(),
                  k->image->what_is_missing().c_str());
  }
  if (cudaError_t error = check_launch(*k, grid, block, smem)) return error;
  // Pointers among the arguments that are another device's memory. (Padding may hold anything.)
  const std::vector<char> bytes = argument_bytes(*module, k->name, args);
  for (size_t i = 0; i + sizeof(void*) <= bytes.size(); i += sizeof(void*)) {
    void* p;
    memcpy(&p, bytes.data() + i, sizeof p);
    if (const int d = device_of(p); is_live(p) && d != me.device) {
      return refuse(cudaErrorIllegalAddress,
                    "%s on device %d gets memory of device %d (word %zu of its arguments: %p)",
                    k->demangled.c_str(), me.device, d, i / sizeof p, p);
    }
  }
  const auto& facts = k->facts();
  if (facts.parameter_bytes && facts.parameter_bytes != int(bytes.size())) {
    return refuse(cudaErrorInvalidValue, "%s: %d bytes of parameters on the device, %zu here",
                  k->demangled.c_str(), facts.parameter_bytes, bytes.size());
  }
  ptx::Kernel* code;
  try {
    code = &module->kernel(k->name);
  } catch (const ptx::Error& e) {
    return refuse(cudaErrorInvalidPtx, "%s: %s", k->demangled.c_str(), e.what());
  }
  return submit(stream, [=] {
    try {
      ptx::launch(*code, {grid.x, grid.y, grid.z}, {block.x, block.y, block.z}, smem, bytes);
    } catch (const ptx::Error& e) {
      return refuse(cudaErrorLaunchFailure, "%s: %s", k->demangled.c_str(), e.what());
    }
    return cudaSuccess;
  });
}

}  // namespace

// ---- the interface, as cuda_runtime_api.h declares it

#define API extern "C" cudaError_t

API softgpu_not_provided(const char* name) {
  return refuse(cudaErrorNotSupported, "not provided by the fake runtime: %s", name);
}

API cudaGetLastError() { return std::exchange(me.last, cudaSuccess); }
API cudaPeekAtLastError() { return me.last; }
extern "C" const char* cudaGetErrorName(cudaError_t e) {
  switch (e) {
#define NAME(x) \
  case x:       \
    return #x
    NAME(cudaSuccess);
    NAME(cudaErrorInvalidValue);
    NAME(cudaErrorMemoryAllocation);
    NAME(cudaErrorInvalidConfiguration);
    NAME(cudaErrorInvalidDeviceFunction);
    NAME(cudaErrorInvalidDevice);
    NAME(cudaErrorNoDevice);
    NAME(cudaErrorInvalidResourceHandle);
    NAME(cudaErrorNotReady);
    NAME(cudaErrorIllegalAddress);
    NAME(cudaErrorLaunchOutOfResources);
    NAME(cudaErrorLaunchFailure);
    NAME(cudaErrorNotSupported);
    NAME(cudaErrorStreamCaptureUnsupported);
    NAME(cudaErrorStreamCaptureInvalidated);
    NAME(cudaErrorStreamCaptureUnjoined);
    NAME(cudaErrorStreamCaptureImplicit);
    NAME(cudaErrorStreamCaptureIsolation);
#undef NAME
    default:
      return "cudaError (see driver_types.h)";
  }
}
extern "C" const char* cudaGetErrorString(cudaError_t e) { return cudaGetErrorName(e); }
API cudaRuntimeGetVersion(int* v) { return *v = CUDART_VERSION, cudaSuccess; }
API cudaDriverGetVersion(int* v) { return *v = CUDART_VERSION, cudaSuccess; }

// devices

API cudaGetDeviceCount(int* n) {
  *n = kDevices;
  return kDevices ? cudaSuccess : done(cudaErrorNoDevice);
}
API cudaGetDevice(int* d) { return *d = me.device, cudaSuccess; }
API cudaSetDevice(int d) {
  if (d < 0 || d >= kDevices) return done(cudaErrorInvalidDevice);
  me.device = d;
  return cudaSuccess;
}
API cudaGetDeviceProperties(cudaDeviceProp* p, int d) {
  if (d < 0 || d >= kDevices) return done(cudaErrorInvalidDevice);
  *p = {};
  snprintf(p->name, sizeof p->name, "Fake H100 (host memory)");
  p->uuid.bytes[0] = char(d + 1);
  p->totalGlobalMem = kMemory;
  p->sharedMemPerBlock = kSharedPerBlock;
  p->sharedMemPerBlockOptin = kSharedOptin;
  p->sharedMemPerMultiprocessor = kSharedPerSm;
  p->reservedSharedMemPerBlock = kSharedReserved;
  p->regsPerBlock = p->regsPerMultiprocessor = kRegisters;
  p->warpSize = kWarp;
  p->maxThreadsPerBlock = kThreadsPerBlock;
  p->maxThreadsPerMultiProcessor = kThreadsPerSm;
  p->maxBlocksPerMultiProcessor = kBlocksPerSm;
  p->maxThreadsDim[0] = p->maxThreadsDim[1] = 1024, p->maxThreadsDim[2] = 64;
  p->maxGridSize[0] = INT32_MAX, p->maxGridSize[1] = p->maxGridSize[2] = 65535;
  p->totalConstMem = 65536;
  p->major = 9;
  p->multiProcessorCount = kMultiprocessors;
  p->l2CacheSize = 50 << 20;
  p->memoryBusWidth = 5120;
  p->unifiedAddressing = p->concurrentKernels = p->canMapHostMemory = 1;
  p->textureAlignment = 512;
  p->pciBusID = d + 1;
  return cudaSuccess;
}
API cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int d) {
  cudaDeviceProp p;
  if (cudaError_t error = cudaGetDeviceProperties(&p, d)) return error;
  switch (attribute) {
    case cudaDevAttrMultiProcessorCount:
      return *value = kMultiprocessors, cudaSuccess;
    case cudaDevAttrMaxSharedMemoryPerBlock:
      return *value = kSharedPerBlock, cudaSuccess;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
      return *value = kSharedOptin, cudaSuccess;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor:
      return *value = kSharedPerSm, cudaSuccess;
    case cudaDevAttrReservedSharedMemoryPerBlock:
      return *value = kSharedReserved, cudaSuccess;
    case cudaDevAttrComputeCapabilityMajor:
      return *value = p.major, cudaSuccess;
    case cudaDevAttrComputeCapabilityMinor:
      return *value = p.minor, cudaSuccess;
    case cudaDevAttrWarpSize:
      return *value = kWarp, cudaSuccess;
    case cudaDevAttrMaxThreadsPerBlock:
      return *value = kThreadsPerBlock, cudaSuccess;
    case cudaDevAttrMaxThreadsPerMultiProcessor:
      return *value = kThreadsPerSm, cudaSuccess;
    case cudaDevAttrMaxRegistersPerBlock:
    case cudaDevAttrMaxRegistersPerMultiprocessor:
      return *value = kRegisters, cudaSuccess;
    case cudaDevAttrL2CacheSize:
      return *value = p.l2CacheSize, cudaSuccess;
    case cudaDevAttrMemoryPoolsSupported:
    case cudaDevAttrCooperativeLaunch:
    case cudaDevAttrHostRegisterSupported:
      return *value = 0, cudaSuccess;
    default:
      return refuse(cudaErrorNotSupported, "not provided: device attribute %d", int(attribute));
  }
}
API cudaDeviceGetPCIBusId(char* text, int n, int d) {
  snprintf(text, size_t(n), "0000:%02x:00.0", d + 1);
  return cudaSuccess;
}
API cudaDeviceGetStreamPriorityRange(int* least, int* greatest) {
  if (least) *least = 0;
  if (greatest) *greatest = -5;
  return cudaSuccess;
}
API cudaDeviceCanAccessPeer(int* can, int, int) { return *can = 0, cudaSuccess; }
API cudaDeviceSynchronize() {
  Lock lock(mutex);
  note("device_synchronize device=%d", me.device);
  return wait_for_all("cudaDeviceSynchronize");
}
API cudaProfilerStart() { return cudaSuccess; }
API cudaProfilerStop() { return cudaSuccess; }

// memory

API cudaMalloc(void** p, size_t bytes) {
  Lock lock(mutex);
  if (cudaError_t error = wait_for_all("cudaMalloc")) return error;
  return allocate(p, bytes);
}
API cudaFree(void* p) {
  Lock lock(mutex);
  if (cudaError_t error = wait_for_all("cudaFree")) return error;
  return release(p);
}
API cudaMemGetInfo(size_t* free, size_t* total) {
  Lock lock(mutex);
  *total = kMemory;
  *free = kMemory - arenas[me.device].used;
  return cudaSuccess;
}
API cudaHostAlloc(void** p, size_t bytes, unsigned) {
  Lock lock(mutex);
  *p = aligned_alloc(kPage, (bytes + kPage - 1) / kPage * kPage);
  if (!*p) return done(cudaErrorMemoryAllocation);
  pinned[static_cast<char*>(*p)] = bytes;
  return cudaSuccess;
}
API cudaFreeHost(void* p) {
  Lock lock(mutex);
  if (p && !pinned.erase(static_cast<char*>(p))) return done(cudaErrorInvalidValue);
  free(p);
  return cudaSuccess;
}
API cudaHostRegister(void* p, size_t bytes, unsigned) {
  Lock lock(mutex);
  pinned[static_cast<char*>(p)] = bytes;
  return cudaSuccess;
}
API cudaHostUnregister(void* p) {
  Lock lock(mutex);
  return pinned.erase(static_cast<char*>(p)) ? cudaSuccess : done(cudaErrorInvalidValue);
}
API cudaPointerGetAttributes(cudaPointerAttributes* a, const void* p) {
  Lock lock(mutex);
  *a = {};
  const int d = device_of(p);
  a->device = d;
  a->type = d >= 0 ? cudaMemoryTypeDevice : cudaMemoryTypeUnregistered;
  if (d < 0 && is_pinned(p)) a->type = cudaMemoryTypeHost, a->device = 0;
  if (a->type != cudaMemoryTypeUnregistered) a->devicePointer = const_cast<void*>(p);
  if (a->type == cudaMemoryTypeHost) a->hostPointer = const_cast<void*>(p);
  return cudaSuccess;
}
API cudaMemcpy(void* to, const void* from, size_t n, cudaMemcpyKind) {
  return copy(to, from, n, nullptr, false);
}
API cudaMemcpyAsync(void* to, const void* from, size_t n, cudaMemcpyKind, cudaStream_t s) {
  return copy(to, from, n, s, true);
}
API cudaMemcpyPeerAsync(void* to, int, const void* from, int, size_t n, cudaStream_t s) {
  return copy(to, from, n, s, true);
}
API cudaMemsetAsync(void* p, int value, size_t n, cudaStream_t s) {
  Lock lock(mutex);
  note("memset_async bytes=%zu device=%d stream=%d", n, stream_of(s).device, stream_of(s).number);
  return submit(s, [=] {
    memset(p, value, n);
    return cudaSuccess;
  });
}
API cudaMemset(void* p, int value, size_t n) { return cudaMemsetAsync(p, value, n, nullptr); }

// streams

API cudaStreamCreateWithPriority(cudaStream_t* s, unsigned, int priority) {
  Lock lock(mutex);
  static int number = 0;
  *s = new CUstream_st;
  (*s)->device = me.device;
  (*s)->number = ++number;
  (*s)->priority = priority;
  streams.insert(*s);
  return cudaSuccess;
}
API cudaStreamCreate(cudaStream_t* s) { return cudaStreamCreateWithPriority(s, 0, 0); }
API cudaStreamCreateWithFlags(cudaStream_t* s, unsigned flags) {
  return cudaStreamCreateWithPriority(s, flags, 0);
}
API cudaStreamDestroy(cudaStream_t s) {
  Lock lock(mutex);
  streams.erase(s);
  delete s;
  return cudaSuccess;
}
API cudaStreamGetPriority(cudaStream_t s, int* p) {
  return *p = stream_of(s).priority, cudaSuccess;
}
API cudaStreamQuery(cudaStream_t s) {
  Lock lock(mutex);
  return wait_for("cudaStreamQuery", stream_of(s).capture);
}
API cudaStreamSynchronize(cudaStream_t s) {
  Lock lock(mutex);
  note("stream_synchronize device=%d stream=%d", stream_of(s).device, stream_of(s).number);
  return wait_for("cudaStreamSynchronize", stream_of(s).capture);
}
API cudaStreamWaitEvent(cudaStream_t s, cudaEvent_t e, unsigned) {
  Lock lock(mutex);
  note("stream_wait_event device=%d stream=%d event=%p", stream_of(s).device, stream_of(s).number,
       static_cast<void*>(e));
  if (e->capture && uintptr_t(s) <= 2) {
    e->capture->valid = false;
    return refuse(cudaErrorStreamCaptureImplicit, "the default stream waits for a captured event");
  }
  CUgraph_st*& capture = stream_of(s).capture;
  if (capture && e->recorded && e->capture != capture) {
    capture->valid = false;
    return refuse(cudaErrorStreamCaptureIsolation,
                  "a captured stream waits for an event from outside of its capture");
  }
  if (e->capture) capture = e->capture;
  return cudaSuccess;
}
API cudaLaunchHostFunc(cudaStream_t s, cudaHostFn_t f, void* data) {
  Lock lock(mutex);
  return submit(s, [=] {
    f(data);
    return cudaSuccess;
  });
}

// events

API cudaEventCreateWithFlags(cudaEvent_t* e, unsigned flags) {
  *e = new CUevent_st;
  (*e)->device = me.device;
  (*e)->timing = !(flags & cudaEventDisableTiming);
  return cudaSuccess;
}
API cudaEventCreate(cudaEvent_t* e) { return cudaEventCreateWithFlags(e, 0); }
API cudaEventDestroy(cudaEvent_t e) { return delete e, cudaSuccess; }
API cudaEventRecordWithFlags(cudaEvent_t e, cudaStream_t s, unsigned) {
  Lock lock(mutex);
  note("event_record device=%d stream=%d event=%p", stream_of(s).device, stream_of(s).number,
       static_cast<void*>(e));
  if (e->device != stream_of(s).device) {
    return refuse(cudaErrorInvalidResourceHandle, "event of device %d recorded on a stream of %d",
                  e->device, stream_of(s).device);
  }
  e->time = std::chrono::steady_clock::now();
  e->capture = stream_of(s).capture;
  e->recorded = true;
  return cudaSuccess;
}
API cudaEventRecord(cudaEvent_t e, cudaStream_t s) { return cudaEventRecordWithFlags(e, s, 0); }
API cudaEventQuery(cudaEvent_t e) { return wait_for("cudaEventQuery", e->capture); }
API cudaEventSynchronize(cudaEvent_t e) {
  note("event_synchronize");
  return wait_for("cudaEventSynchronize", e->capture);
}
API cudaEventElapsedTime(float* ms, cudaEvent_t from, cudaEvent_t to) {
  if (!from->timing || !to->timing) return done(cudaErrorInvalidResourceHandle);
  *ms = std::chrono::duration<float, std::milli>(to->time - from->time).count();
  return cudaSuccess;
}

// graphs

API cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode* mode) {
  return std::swap(*mode, me.capture_mode), cudaSuccess;
}
API cudaStreamBeginCapture(cudaStream_t s, cudaStreamCaptureMode) {
  Lock lock(mutex);
  static unsigned long long id = 0;
  if (uintptr_t(s) <= 2) {
    return refuse(cudaErrorStreamCaptureUnsupported, "capture of the default stream");
  }
  s->capture = new CUgraph_st;
  s->capture->id = ++id;
  s->origin = true;
  return cudaSuccess;
}
API cudaStreamEndCapture(cudaStream_t s, cudaGraph_t* graph) {
  Lock lock(mutex);
  *graph = s->capture;
  for (auto* other : streams) {
    if (other->capture == *graph) other->capture = nullptr, other->origin = false;
  }
  if (*graph && (*graph)->valid) return cudaSuccess;
  *graph = nullptr;
  return done(cudaErrorStreamCaptureInvalidated);
}
API cudaStreamIsCapturing(cudaStream_t s, cudaStreamCaptureStatus* status) {
  Lock lock(mutex);
  if (uintptr_t(s) <= 2 && any_capture() && me.capture_mode != cudaStreamCaptureModeRelaxed) {
    return refuse(cudaErrorStreamCaptureImplicit, "default stream used while another is captured");
  }
  auto* capture = stream_of(s).capture;
  *status = !capture         ? cudaStreamCaptureStatusNone
            : capture->valid ? cudaStreamCaptureStatusActive
                             : cudaStreamCaptureStatusInvalidated;
  return cudaSuccess;
}
API cudaStreamGetCaptureInfo(cudaStream_t s, cudaStreamCaptureStatus* status,
                             unsigned long long* id, cudaGraph_t* graph,
                             const cudaGraphNode_t** nodes, const cudaGraphEdgeData** edges,
                             size_t* count) {
  if (cudaError_t error = cudaStreamIsCapturing(s, status)) return error;
  auto* capture = stream_of(s).capture;
  if (id) *id = capture ? capture->id : 0;
  if (graph) *graph = capture;
  if (nodes) *nodes = nullptr;
  if (edges) *edges = nullptr;
  if (count) *count = 0;
  return cudaSuccess;
}
API cudaGraphGetNodes(cudaGraph_t graph, cudaGraphNode_t* nodes, size_t* count) {
  if (nodes) return softgpu_not_provided("cudaGraphGetNodes, other than to count");
  return *count = graph->nodes.size(), cudaSuccess;
}
API cudaGraphInstantiateWithFlags(cudaGraphExec_t* exec, cudaGraph_t graph, unsigned long long) {
  *exec = new CUgraphExec_st{graph->nodes};
  return cudaSuccess;
}
API cudaGraphInstantiate(cudaGraphExec_t* exec, cudaGraph_t graph, unsigned long long flags) {
  return cudaGraphInstantiateWithFlags(exec, graph, flags);
}
API cudaGraphLaunch(cudaGraphExec_t exec, cudaStream_t s) {
  Lock lock(mutex);
  note("graph_launch nodes=%zu device=%d stream=%d", exec->nodes.size(), stream_of(s).device,
       stream_of(s).number);
  for (const Work& work : exec->nodes) {
    if (cudaError_t error = submit(s, work)) return error;
  }
  return cudaSuccess;
}
API cudaGraphDestroy(cudaGraph_t graph) { return delete graph, cudaSuccess; }
API cudaGraphExecDestroy(cudaGraphExec_t exec) { return delete exec, cudaSuccess; }

// functions

API cudaFuncGetAttributes(cudaFuncAttributes* a, const void* function) {
  Lock lock(mutex);
  const Kernel* k = kernel_of(function);
  if (!k) return done(cudaErrorInvalidDeviceFunction);
  const auto& f = k->facts();
  *a = {};
  a->sharedSizeBytes = size_t(f.static_shared);
  a->numRegs = f.registers;
  a->maxThreadsPerBlock = f.max_threads ? f.max_threads : kThreadsPerBlock;
  a->binaryVersion = a->ptxVersion = 90;
  a->maxDynamicSharedSizeBytes = k->dynamic_limit();
  a->preferredShmemCarveout = -1;
  return cudaSuccess;
}
API cudaFuncSetAttribute(const void* function, cudaFuncAttribute attribute, int value) {
  Lock lock(mutex);
  Kernel* k = kernel_of(function);
  if (!k) return done(cudaErrorInvalidDeviceFunction);
  if (attribute == cudaFuncAttributePreferredSharedMemoryCarveout) return cudaSuccess;
  if (attribute != cudaFuncAttributeMaxDynamicSharedMemorySize) {
    return softgpu_not_provided("cudaFuncSetAttribute, this attribute");
  }
  if (value < 0 || value + k->facts().static_shared > kSharedOptin) {
    if (!setting("SOFTGPU_STRICT", 1)) {  // to see what is behind this fault
      k->max_dynamic[me.device] = kSharedOptin - k->facts().static_shared;
      return cudaSuccess;
    }
    return refuse(
        cudaErrorInvalidValue,
        "MaxDynamicSharedMemorySize %d and %d bytes of static shared memory are more than "
        "%d: %s",
        value, k->facts().static_shared, kSharedOptin, k->demangled.c_str());
  }
  k->max_dynamic[me.device] = value;
  return cudaSuccess;
}
API cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int* blocks, const void* function,
                                                           int threads, size_t smem, unsigned) {
  Lock lock(mutex);
  const Kernel* k = kernel_of(function);
  if (!k) return done(cudaErrorInvalidDeviceFunction);
  *blocks = resident_blocks(*k, threads, smem);
  note("occupancy blocks=%d threads=%d smem=%zu static=%d registers=%d kernel=%s", *blocks, threads,
       smem, k->facts().static_shared, k->facts().registers, k->demangled.c_str());
  return cudaSuccess;
}
API cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, const void* function, int threads,
                                                  size_t smem) {
  return cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(blocks, function, threads, smem, 0);
}
API cudaLaunchKernel(const void* function, dim3 grid, dim3 block, void** args, size_t smem,
                     cudaStream_t stream) {
  return launch(function, grid, block, args, smem, stream);
}
API cudaLaunchKernelExC(const cudaLaunchConfig_t* c, const void* function, void** args) {
  return launch(function, c->gridDim, c->blockDim, args, c->dynamicSmemBytes, c->stream);
}
API __cudaLaunchKernel(cudaKernel_t kernel, dim3 grid, dim3 block, void** args, size_t smem,
                       cudaStream_t stream) {
  return launch(kernel, grid, block, args, smem, stream);
}
API __cudaGetKernel(cudaKernel_t* out, const void* function) {
  Lock lock(mutex);
  *out = reinterpret_cast<cudaKernel_t>(kernel_of(function));
  return *out ? cudaSuccess : done(cudaErrorInvalidDeviceFunction);
}
extern "C" unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t smem,
                                                CUstream_st* stream) {
  me.calls.push_back({grid, block, smem, stream});
  return 0;
}
API __cudaPopCallConfiguration(dim3* grid, dim3* block, size_t* smem, void* stream) {
  const auto call = me.calls.back();
  me.calls.pop_back();
  *grid = call.grid;
  *block = call.block;
  *smem = call.smem;
  *static_cast<cudaStream_t*>(stream) = call.stream;
  return cudaSuccess;
}

// What the compiler puts into every object with device code.
extern "C" void** __cudaRegisterFatBinary(void* wrapper) {
  return reinterpret_cast<void**>(new softgpu::Image(wrapper, 90));
}
extern "C" void __cudaRegisterFatBinaryEnd(void**) {}
extern "C" void __cudaUnregisterFatBinary(void**) {}
extern "C" char __cudaInitModule(void**) { return 1; }
extern "C" void __cudaRegisterFunction(void** image, const char* host, char*, const char* name, int,
                                       uint3*, uint3*, dim3*, dim3*, int*) {
  Lock lock(mutex);
  auto* k = new Kernel{name, demangle(name), reinterpret_cast<softgpu::Image*>(image), {}};
  std::fill(std::begin(k->max_dynamic), std::end(k->max_dynamic), -1);
  kernels[host] = k;
}
extern "C" void __cudaRegisterVar(void**, char*, char*, const char*, int, size_t, int, int) {}

// Of the driver, what torch asks for through the runtime.
API cudaGetDriverEntryPointByVersion(const char*, void** f, unsigned, unsigned long long,
                                     cudaDriverEntryPointQueryResult* result) {
  *f = nullptr;
  if (result) *result = cudaDriverEntryPointSymbolNotFound;
  return cudaSuccess;
}

// ---- what tests ask for

extern "C" void softgpu_log(int on) {
  Lock lock(mutex);
  logging = on;
  log_text.clear();
}
extern "C" const char* softgpu_log_text() { return log_text.c_str(); }
extern "C" int softgpu_number(cudaStream_t stream) { return stream_of(stream).number; }
