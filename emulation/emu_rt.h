// SPDX-License-Identifier: Apache-2.0
// What the files of the runtime share: the state of the block that is running, and the hooks
// between scheduler, collectives, memory and race checker.
#pragma once
#include <random>
#include <string>
#include <vector>

#include "emu.h"
#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#else
#define ASAN_POISON_MEMORY_REGION(p, n) ((void)0)
#define ASAN_UNPOISON_MEMORY_REGION(p, n) ((void)0)
#endif

namespace emu {

constexpr size_t kStackBytes = 256 << 10;        // of one fiber
constexpr size_t kDynamicSharedMax = 227 << 10;  // of one block, as on sm_90
constexpr int kNoBarrier = -1, kEngineBarrier = 99;

struct PendingCopy {
  char* dst;
  const char* src;
  int bytes, src_bytes, group;
};

struct Fiber {
  void* sp;
  char* stack;
  unsigned tid;
  bool done;
  // What it waits in; `what` is null while it can run.
  const char* what = nullptr;
  uint32_t mask;
  Site site;
  void* arg;
  int barrier;
  // cp.async
  std::vector<PendingCopy> pending;
  int group;
  void* fake_stack;  // AddressSanitizer's
};

// The block that is running.
struct Block {
  std::vector<Fiber> fibers;
  Fiber* current = nullptr;
  unsigned threads = 0, done = 0;
  char *stacks_lo = nullptr, *stacks_hi = nullptr;  // all stacks lie between
  uint32_t warp_waiting[32], warp_done[32];  // lanes in a warp collective; lanes that have returned
};
extern Block block;
extern std::mt19937 rng;
extern char* launch_frame;  // of the thread that launches

std::string at(Site site);           // file:line
std::string describe(unsigned tid);  // block, thread, warp and lane
inline unsigned current_tid() { return block.current->tid; }

// ---- scheduler (emu_rt.cpp) ----
void reschedule(bool dying);  // leave the current fiber for a ready one
void make_ready(const std::vector<unsigned>& tids);
void make_ready(unsigned tid);
void park(const char* what, Site site);              // the current thread waits until ...
void unpark(std::vector<unsigned> tids);             // ... it is named here
[[noreturn]] void fail(const std::string& message);  // ends the launch
// For engines that work beside the threads (TMA, wgmma): called when no thread can go on, until one
// can or it returns false; called when a block starts.
std::vector<bool (*)()>& idle_hooks();
std::vector<void (*)()>& block_hooks();

// ---- collectives (emu_collectives.cpp) ----
void reset_barriers();
void check_return(const Fiber& fiber);  // fatal if a collective waits for this thread

// ---- memory (emu_memory.cpp) ----
enum class Space { global, shared, own_stack, other_stack, host_static };
Space classify(const void* p);
bool shared_in_bounds(const void* p, size_t n);
bool host_memory(const void* p);  // the library's constants, or the launching thread's stack
bool copies_early();
void reset_shared(size_t dynamic_bytes);
void find_static_memory();  // where the static variables of this library are
void catch_invalid_addresses();

namespace race {
#ifdef EMU_RACE
void enable(bool on);
void pause(int delta);
int exchange_quiet(int quiet);
void block_start(unsigned threads, unsigned serial, unsigned launch);
void join_warp(unsigned first, uint32_t mask);
void arrive(unsigned tid, int barrier);
void acquire(unsigned tid, int barrier);
void join_barrier(int barrier, const std::vector<unsigned>& waiters);
void access(const void* p, size_t n, bool write, bool atomic, void* pc);
void aligned_access(const void* p, size_t n, bool write, void* pc);
void async_begin(unsigned tid, void* dst, int n, int group);
void async_end(unsigned tid, int upto);
std::string report();
std::string where(void* pc);
#else
inline void enable(bool) {}
inline void pause(int) {}
inline int exchange_quiet(int) { return 0; }
inline void block_start(unsigned, unsigned, unsigned) {}
inline void join_warp(unsigned, uint32_t) {}
inline void arrive(unsigned, int) {}
inline void acquire(unsigned, int) {}
inline void join_barrier(int, const std::vector<unsigned>&) {}
inline void access(const void*, size_t, bool, bool, void*) {}
inline void async_begin(unsigned, void*, int, int) {}
inline void async_end(unsigned, int) {}
inline std::string report() { return ""; }
inline std::string where(void*) { return "?"; }
#endif
}  // namespace race
}  // namespace emu
