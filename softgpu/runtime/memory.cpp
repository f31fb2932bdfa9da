// SPDX-License-Identifier: Apache-2.0
#include "runtime/memory.h"

#include <sys/mman.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <map>
#include <utility>

#include "runtime/core.h"
#include "runtime/order.h"
#include "runtime/settings.h"
#include "runtime/streams.h"

namespace softgpu {
namespace {

constexpr size_t kArena = size_t(8) << 40, kPage = 4096;
constexpr size_t kAlignment = 256;                  // of what cudaMalloc returns
constexpr size_t kPoisonAtMost = size_t(64) << 20;  // more would take long
constexpr unsigned char kFresh = 0xff;  // NaN in every floating-point type, -1 in others

// Where in its pages an allocation lies: its end is as near to the guard page behind as an
// alignment allows, or its begin touches the guard page before.
constexpr size_t kAtBegin = 0;
size_t placement = kAlignment;  // that alignment, or kAtBegin

struct Arena {
  char* base = nullptr;
  size_t next = kPage;                      // not yet used
  size_t used = 0;                          // bytes
  std::map<char*, Allocation> allocations;  // by their pages; freed ones too, for messages
};
Arena arenas[kMaxDevices];
std::map<const char*, size_t> pinned;
int damages = 0;  // since Python asked

size_t round_up(size_t value, size_t unit) { return (value + unit - 1) / unit * unit; }

bool reserve(Arena& a) {
  if (a.base) return true;
  const int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
  void* m = mmap(nullptr, kArena, PROT_NONE, flags, -1, 0);
  if (m == MAP_FAILED) return false;
  a.base = static_cast<char*>(m);
  return true;
}

cudaError_t allocate(void** out, size_t bytes) {
  *out = nullptr;
  if (bytes == 0) return cudaSuccess;
  Arena& a = arenas[me.device];
  if (!reserve(a)) return refuse(cudaErrorMemoryAllocation, "no addresses left on the host");
  const size_t size = round_up(bytes, placement == kAtBegin ? kAlignment : placement);
  const size_t mapped = round_up(size, kPage);
  if (a.used + size > settings().memory || a.next + mapped + kPage > kArena) {
    return done(cudaErrorMemoryAllocation);
  }
  char* pages = a.base + a.next;
  if (mprotect(pages, mapped, PROT_READ | PROT_WRITE)) return done(cudaErrorMemoryAllocation);
  a.next += mapped + kPage;
  a.used += mapped;
  char* begin = placement == kAtBegin ? pages : pages + mapped - size;
  memset(pages, kFresh, size_t(begin - pages));
  memset(begin + bytes, kFresh, mapped - size_t(begin - pages) - bytes);
  if (settings().poison && bytes <= kPoisonAtMost) memset(begin, kFresh, bytes);
  a.allocations[pages] = {begin, bytes, pages, mapped, me.device, true};
  *out = begin;
  note("malloc device=%d bytes=%zu", me.device, bytes);
  return cudaSuccess;
}

// The allocation, live or freed, whose pages are the last that begin at or before an address.
Allocation* last_before(const void* p) {
  const int d = device_of(p);
  if (d < 0) return nullptr;
  auto after = arenas[d].allocations.upper_bound(static_cast<char*>(const_cast<void*>(p)));
  return after == arenas[d].allocations.begin() ? nullptr : &std::prev(after)->second;
}

cudaError_t release(void* p) {
  if (!p) return cudaSuccess;
  Allocation* a = last_before(p);
  if (!a || a->begin != p) {
    return refuse(cudaErrorInvalidValue, "cudaFree of %p, which is no allocation", p);
  }
  if (!a->live) {
    return refuse(cudaErrorInvalidValue, "cudaFree of %p, which was freed before (%zu bytes)", p,
                  a->bytes);
  }
  damaged(*a, "before cudaFree");
  forget(*a);
  madvise(a->pages, a->mapped, MADV_DONTNEED);
  mprotect(a->pages, a->mapped, PROT_NONE);
  a->live = false;
  arenas[a->device].used -= a->mapped;
  note("free device=%d", a->device);
  return cudaSuccess;
}

// A range of device memory that a copy or a fill touches must lie in one allocation.
cudaError_t check_range(const char* call, const void* p, size_t bytes) {
  if (!bytes || device_of(p) < 0) return cudaSuccess;
  const Allocation* a = allocation_at(p);
  if (a && static_cast<const char*>(p) + bytes <= a->end()) return cudaSuccess;
  return refuse(cudaErrorInvalidValue, "%s of %zu bytes at %p%s", call, bytes, p,
                a ? ", past the end of its allocation" : place_of(p).c_str());
}

const char* copy_kind(const void* to, const void* from) {
  static const char* names[] = {"h2h", "h2d", "d2h", "d2d"};
  return names[2 * (device_of(from) >= 0) + (device_of(to) >= 0)];
}

cudaError_t copy(const char* call, void* to, const void* from, size_t bytes, cudaStream_t handle,
                 bool waits) {
  Lock lock(mutex);
  CUstream_st* s = stream_of(handle, call);
  if (!s) return me.last;
  note("memcpy%s kind=%s bytes=%zu device=%d stream=%d pinned=%d", waits ? "" : "_async",
       copy_kind(to, from), bytes, s->device, s->number, is_pinned(to) || is_pinned(from));
  if (waits) {
    if (cudaError_t error = unsafe_in_capture(call)) return error;
  }
  if (cudaError_t error = check_range(call, to, bytes)) return error;
  if (cudaError_t error = check_range(call, from, bytes)) return error;
  const cudaError_t error = submit(*s, call, [=] {
    touch(from, bytes, false);
    touch(to, bytes, true);
    memmove(to, from, bytes);
    return cudaSuccess;
  });
  if (waits) host_waits_for(s->clock);
  return error;
}

cudaError_t fill(const char* call, void* p, int value, size_t bytes, cudaStream_t handle) {
  Lock lock(mutex);
  CUstream_st* s = stream_of(handle, call);
  if (!s) return me.last;
  note("memset_async bytes=%zu device=%d stream=%d", bytes, s->device, s->number);
  if (cudaError_t error = check_range(call, p, bytes)) return error;
  return submit(*s, call, [=] {
    touch(p, bytes, true);
    memset(p, value, bytes);
    return cudaSuccess;
  });
}

}  // namespace

int device_of(const void* p) {
  const auto c = static_cast<const char*>(p);
  for (int d = 0; d < settings().devices; ++d) {
    if (arenas[d].base && c >= arenas[d].base && c < arenas[d].base + kArena) return d;
  }
  return -1;
}

const Allocation* allocation_at(const void* p) {
  const Allocation* a = last_before(p);
  const auto c = static_cast<const char*>(p);
  return a && a->live && c >= a->begin && c < a->end() ? a : nullptr;
}

std::string place_of(const void* p) {
  const Allocation* a = last_before(p);
  if (!a) return device_of(p) < 0 ? "" : ", before every allocation";
  const auto c = static_cast<const char*>(p);
  const std::string of = std::to_string(a->bytes) + " bytes";
  if (!a->live && c < a->end()) return ", in an allocation of " + of + " that was freed";
  if (c >= a->end()) {
    const auto next = arenas[a->device].allocations.upper_bound(a->pages);
    if (next == arenas[a->device].allocations.end() || c - a->end() <= next->first - c) {
      return ", " + std::to_string(c - a->end()) + " bytes past an allocation of " + of;
    }
    a = &next->second;
  }
  return ", " + std::to_string(a->begin - c) + " bytes before an allocation of " +
         std::to_string(a->bytes) + " bytes";
}

bool damaged(const Allocation& a, const char* by) {
  const auto clean = [](const char* from, const char* to) {
    return std::find_if(from, to, [](char c) { return static_cast<unsigned char>(c) != kFresh; });
  };
  const char* const last = a.pages + a.mapped;
  const char* at = clean(a.pages, a.begin);
  if (at == a.begin) at = clean(a.end(), last);
  if (at == last) return false;
  ++damages;
  fprintf(stderr, "softgpu: %s: something was written at %p%s\n", by, static_cast<const void*>(at),
          place_of(at).c_str());
  memset(a.pages, kFresh, size_t(a.begin - a.pages));
  memset(a.end(), kFresh, size_t(last - a.end()));
  return true;
}

bool is_pinned(const void* p) {
  const auto c = static_cast<const char*>(p);
  auto after = pinned.upper_bound(c);
  if (after == pinned.begin()) return false;
  --after;
  return c < after->first + after->second;
}

}  // namespace softgpu

using namespace softgpu;

// ---- for Python

// How cudaMalloc places what it returns from now on: 0 at the begin of its pages; else at their
// end, aligned to so many bytes.
extern "C" void softgpu_place(size_t alignment) {
  Lock lock(mutex);
  placement = alignment;
}

// The allocations around which something was written since it was last asked for; each is a line on
// stderr.
extern "C" int softgpu_damaged() {
  Lock lock(mutex);
  for (const Arena& arena : arenas) {
    for (const auto& [pages, a] : arena.allocations) {
      if (a.live) damaged(a, "by now");
    }
  }
  return std::exchange(damages, 0);
}

// ---- the interface

SOFTGPU_API cudaMalloc(void** p, size_t bytes) {
  Lock lock(mutex);
  if (cudaError_t error = unsafe_in_capture("cudaMalloc")) return error;
  return allocate(p, bytes);
}
SOFTGPU_API cudaFree(void* p) {
  Lock lock(mutex);
  if (cudaError_t error = unsafe_in_capture("cudaFree")) return error;
  return release(p);
}
SOFTGPU_API cudaMemGetInfo(size_t* free, size_t* total) {
  Lock lock(mutex);
  *total = settings().memory;
  *free = *total - arenas[me.device].used;
  return cudaSuccess;
}

SOFTGPU_API cudaHostAlloc(void** p, size_t bytes, unsigned) {
  Lock lock(mutex);
  *p = aligned_alloc(kPage, round_up(std::max(bytes, size_t(1)), kPage));
  if (!*p) return done(cudaErrorMemoryAllocation);
  pinned[static_cast<char*>(*p)] = bytes;
  return cudaSuccess;
}
SOFTGPU_API cudaFreeHost(void* p) {
  Lock lock(mutex);
  if (p && !pinned.erase(static_cast<char*>(p))) {
    return refuse(cudaErrorInvalidValue, "cudaFreeHost of %p, which is no allocation", p);
  }
  free(p);
  return cudaSuccess;
}
SOFTGPU_API cudaHostRegister(void* p, size_t bytes, unsigned) {
  Lock lock(mutex);
  pinned[static_cast<char*>(p)] = bytes;
  return cudaSuccess;
}
SOFTGPU_API cudaHostUnregister(void* p) {
  Lock lock(mutex);
  if (pinned.erase(static_cast<char*>(p))) return cudaSuccess;
  return refuse(cudaErrorInvalidValue, "cudaHostUnregister of %p, which is not registered", p);
}

SOFTGPU_API cudaPointerGetAttributes(cudaPointerAttributes* a, const void* p) {
  Lock lock(mutex);
  *a = {};
  a->device = device_of(p);
  a->type = a->device >= 0 ? cudaMemoryTypeDevice : cudaMemoryTypeUnregistered;
  if (a->device < 0 && is_pinned(p)) a->type = cudaMemoryTypeHost, a->device = 0;
  if (a->type != cudaMemoryTypeUnregistered) a->devicePointer = const_cast<void*>(p);
  if (a->type == cudaMemoryTypeHost) a->hostPointer = const_cast<void*>(p);
  return cudaSuccess;
}

SOFTGPU_API cudaMemcpy(void* to, const void* from, size_t n, cudaMemcpyKind) {
  return copy("cudaMemcpy", to, from, n, nullptr, true);
}
SOFTGPU_API cudaMemcpyAsync(void* to, const void* from, size_t n, cudaMemcpyKind, cudaStream_t s) {
  return copy("cudaMemcpyAsync", to, from, n, s, false);
}
SOFTGPU_API cudaMemcpyPeerAsync(void* to, int, const void* from, int, size_t n, cudaStream_t s) {
  return copy("cudaMemcpyPeerAsync", to, from, n, s, false);
}
SOFTGPU_API cudaMemsetAsync(void* p, int value, size_t n, cudaStream_t s) {
  return fill("cudaMemsetAsync", p, value, n, s);
}
SOFTGPU_API cudaMemset(void* p, int value, size_t n) {
  return fill("cudaMemset", p, value, n, nullptr);
}
