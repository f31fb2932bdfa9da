// SPDX-License-Identifier: Apache-2.0
// What a kernel sees when its source is compiled as plain C++ ("emulated CUDA"). Force-included
// (-include emu.h); nvcc builds never see it. Every CUDA thread is a fiber; scheduling is in
// emu_rt.cpp, matching of collectives in emu_collectives.cpp, memory in emu_memory.cpp.
#pragma once
// NVIDIA's headers compile on the host: vector types, half types, dim3, streams, error codes.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <exception>
#include <string>
#include <tuple>
#include <type_traits>

#define EMU 1
// cuda_runtime.h has already turned __global__, __device__, __host__, __constant__,
// __grid_constant__ into nothing.
#undef __launch_bounds__
#define __launch_bounds__(...)
// A plain static __shared__ variable works, but is neither refilled with NaN for each block nor (in
// a template, with g++) between ASan's red zones: kernels should use SHARED_ARRAY or one struct in
// dynamic shared memory.
#undef __shared__
#define __shared__ static

namespace emu {

struct Site {
  const char* file;
  int line;
  static constexpr Site here(const char* f = __builtin_FILE(), int l = __builtin_LINE()) {
    return {f, l};
  }
};
// The last parameter of a device function: where the kernel called it.
#define EMU_SITE ::emu::Site emu_site = ::emu::Site::here()

enum class Order { forward, reverse, random };
enum class Async { late, early, random };  // a cp.async lands at its wait, at its issue, or either
struct Config {
  Order order = Order::forward;
  Async async = Async::late;
  unsigned seed = 1;
  bool sites = true;  // lanes of a collective must come from the same source line
};
Config& config();
std::string& last_error();  // why the last launch failed

// ---- the runtime's interface, never instrumented ----
using Combine = void (*)(void** lane_args, uint32_t mask);
// All lanes in `mask` must call with the same (what, mask, site); the last one runs combine over
// all args.
void warp_collective(const char* what, uint32_t mask, Site site, void* arg, Combine combine);
// Named barrier `id` for `count` threads (0 = whole block); arrive only when !wait.
void block_barrier(const char* what, int id, int count, bool wait, Site site,
                   int* reduce = nullptr);
[[noreturn]] void fatal(const std::string& what, Site site);
[[noreturn]] void misaligned(const char* what, size_t bytes, Site site);
void yield();
unsigned lane();
// The block's dynamic shared memory; an error if the launch gave less than `need` bytes.
char* dynamic_shared(size_t need, Site site);
// The block's variable of this key, between red zones.
void* static_shared(const void* key, size_t n, size_t align);
// Address in the 32-bit shared window (dynamic shared memory only).
uint32_t shared_offset(const void* p);
char* shared_at(uint32_t offset);
void cp_async(void* dst, const void* src, int bytes, int src_bytes, Site site);
void cp_async_commit();
void cp_async_wait(int pending, bool all);
// mma.sync.aligned.m16n8k16.row.col.f32 of bf16 or f16 pairs; c is in and out.
struct MmaArg {
  uint32_t a[4], b[2];
  float c[4];
};
void mma_bf16(MmaArg& arg, Site site);
void mma_f16(MmaArg& arg, Site site);
// ldmatrix.sync.aligned.m8n8.x{n}
struct LdsmArg {
  const void* row;
  int n;
  uint32_t r[4];
};
void ldmatrix(LdsmArg& arg, bool trans, Site site);
// Announces an access that the compiler's instrumentation cannot see (atomics, async copies).
void note_access(const void* p, size_t n, bool write, bool atomic);
// No race tracking inside: runtime code.
struct Quiet {
  Quiet();
  ~Quiet();
};
// Runs every thread of the grid; throws what went wrong.
void launch(void (*body)(void*), void* closure, dim3 grid, dim3 threads, size_t smem);
unsigned& launch_count();

// The same for a kernel and its arguments; every thread gets its own copy of by-value arguments.
// What goes wrong is a launch failure, with its text in last_error().
template <class... P, class... A>
cudaError_t launch_kernel(void (*kernel)(P...), dim3 grid, dim3 block, size_t smem, A&&... args) {
  auto call = std::make_tuple(kernel, std::tuple<std::decay_t<P>...>(std::forward<A>(args)...));
  try {
    launch(
        [](void* c) {
          auto& t = *static_cast<decltype(call)*>(c);
          std::apply(std::get<0>(t), std::get<1>(t));
        },
        &call, grid, block, smem);
  } catch (const std::exception& e) {
    last_error() = e.what();
    return cudaErrorLaunchFailure;
  }
  return cudaSuccess;
}

template <class T>
struct ShflArg {
  T v;
  int src;
};
template <class T>
T shfl(const char* what, uint32_t mask, T v, int src, Site site) {
  ShflArg<T> a{v, src};
  warp_collective(what, mask, site, &a, [](void** l, uint32_t m) {
    T out[32];
    for (int i = 0; i < 32; ++i)
      if (m >> i & 1) {
        auto* me = static_cast<ShflArg<T>*>(l[i]);
        if (!(m >> me->src & 1))
          fatal("shuffle reads lane " + std::to_string(me->src) + ", which is not in the mask",
                {"", 0});
        out[i] = static_cast<ShflArg<T>*>(l[me->src])->v;
      }
    for (int i = 0; i < 32; ++i)
      if (m >> i & 1) static_cast<ShflArg<T>*>(l[i])->v = out[i];
  });
  return a.v;
}
// Each lane gives a T and gets f(mask, all values) - computed once, the same for all lanes.
template <class T, class R, class F>
struct AllArg {
  T v;
  R r;
  F f;
};
template <class R, class T, class F>
R all_lanes(const char* what, uint32_t mask, T v, Site site, F f) {
  AllArg<T, R, F> a{v, R(), f};
  warp_collective(what, mask, site, &a, [](void** l, uint32_t m) {
    T v[32];
    AllArg<T, R, F>* some = nullptr;
    for (int i = 0; i < 32; ++i) {
      v[i] = m >> i & 1 ? static_cast<AllArg<T, R, F>*>(l[i])->v : T();
      if (m >> i & 1) some = static_cast<AllArg<T, R, F>*>(l[i]);
    }
    R r = some->f(m, v);
    for (int i = 0; i < 32; ++i)
      if (m >> i & 1) static_cast<AllArg<T, R, F>*>(l[i])->r = r;
  });
  return a.r;
}
template <class T, class F>
__forceinline__ T atomic(T* p, F f) {
  note_access(p, sizeof(T), true, true);
  Quiet q;
  T old = *p;
  *p = f(old);
  return old;
}
template <class T>
struct same {
  typedef T type;
};
template <class T>
using same_t = typename same<T>::type;
}  // namespace emu

// ---- built-in variables (set by the scheduler at each switch) ----
extern uint3 threadIdx, blockIdx;
extern dim3 blockDim, gridDim;
constexpr int warpSize = 32;

#include "emu_intrinsics.h"
