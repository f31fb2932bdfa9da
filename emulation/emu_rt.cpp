// SPDX-License-Identifier: Apache-2.0
// Fibers, scheduler and launch of the emulated GPU. Compiled without thread instrumentation. One OS
// thread; blocks run one after another; within a block a fiber runs until it waits in a collective,
// then the next ready one (per Order) is resumed.
#include "emu_rt.h"

#include <sys/mman.h>

#include <cstdio>
#include <deque>
#include <map>
#include <stdexcept>

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

// Switch stacks: save callee-saved registers on the old one, load them from the new one.
#if defined(__x86_64__)
extern "C" void emu_switch(void** save, void* load);
asm(R"(.text
.globl emu_switch
.type emu_switch,@function
emu_switch:
  pushq %rbp; pushq %rbx; pushq %r12; pushq %r13; pushq %r14; pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15; popq %r14; popq %r13; popq %r12; popq %rbx; popq %rbp
  ret
.size emu_switch, .-emu_switch)");
#else
#error "port emu_switch (or use ucontext) for this machine"
#endif

namespace emu {

Block block;
std::mt19937 rng;
char* launch_frame;

namespace {
Config g_config;
std::deque<unsigned> ready;
std::vector<char*> stacks;
void* main_sp;
const void* main_bottom;
size_t main_size;
void* main_fake;
void (*kernel_body)(void*);
void* kernel_closure;
std::string g_error;
size_t dynamic_bytes;
unsigned block_serial, launch_serial;

void set_index(const Fiber& f) {
  threadIdx.x = f.tid % blockDim.x;
  threadIdx.y = f.tid / blockDim.x % blockDim.y;
  threadIdx.z = f.tid / blockDim.x / blockDim.y;
}

void switch_to(void** save, void** fake, void* load, const void* bottom, size_t size, bool dying) {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(dying ? nullptr : fake, bottom, size);
  emu_switch(save, load);
  __sanitizer_finish_switch_fiber(*fake, nullptr, nullptr);
#else
  (void)fake, (void)bottom, (void)size, (void)dying;
  emu_switch(save, load);
#endif
}

[[noreturn]] void to_main() {
  void* dead;
  switch_to(&dead, &block.current->fake_stack, main_sp, main_bottom, main_size, true);
  __builtin_unreachable();
}

// Groups the threads by where they wait.
std::string deadlock_report() {
  std::string m = "deadlock: no thread of the block can go on";
  std::map<std::string, std::pair<int, unsigned>> groups;
  for (auto& f : block.fibers) {
    char mask[32];
    snprintf(mask, sizeof mask, f.barrier < 0 && !f.done ? " mask %08x" : "", f.mask);
    auto& g = groups[f.done ? "have returned from the kernel"
                            : std::string("wait in ") + f.what + mask + " at " + at(f.site)];
    if (!g.first++) g.second = f.tid;
  }
  for (auto& g : groups)
    m += "\n    " + std::to_string(g.second.first) + " threads " + g.first +
         ", first: " + describe(g.second.second);
  return m;
}

void fiber_main() {
#if defined(__SANITIZE_ADDRESS__)
  const void* from;
  size_t n;
  __sanitizer_finish_switch_fiber(nullptr, &from, &n);
  if (!main_size) {  // the block's first fiber was entered from the main stack
    main_bottom = from;
    main_size = n;
  }
#endif
  kernel_body(kernel_closure);
  cp_async_wait(0, true);
  Quiet q;
  Fiber& me = *block.current;
  me.done = true;
  ++block.done;
  block.warp_done[me.tid / 32] |= 1u << me.tid % 32;
  check_return(me);
  reschedule(true);
  __builtin_unreachable();
}

char* stack_of(unsigned tid) {
  while (tid >= stacks.size()) {
    void* m = mmap(nullptr, kStackBytes + 4096, PROT_READ | PROT_WRITE,
                   MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (m == MAP_FAILED) throw std::bad_alloc();
    mprotect(m, 4096, PROT_NONE);  // guard page under the stack
    char* stack = static_cast<char*>(m) + 4096;
    stacks.push_back(stack);
    if (!block.stacks_lo || stack < block.stacks_lo) block.stacks_lo = stack;
    block.stacks_hi = std::max(block.stacks_hi, stack + kStackBytes);
  }
  return stacks[tid];
}

void start_fiber(Fiber& f, unsigned tid) {
  f = Fiber{};
  f.stack = stack_of(tid);
  f.tid = tid;
  f.barrier = kNoBarrier;
  ASAN_UNPOISON_MEMORY_REGION(f.stack, kStackBytes);
  void** top = reinterpret_cast<void**>(f.stack + kStackBytes);
  *--top = nullptr;
  *--top = reinterpret_cast<void*>(fiber_main);
  for (int i = 0; i < 6; ++i) *--top = nullptr;
  f.sp = top;
}

void run_block() {
  const unsigned n = block.threads;
  for (unsigned w = 0; w < 32; ++w) {  // lanes that the block does not have count as returned
    block.warp_waiting[w] = 0;
    block.warp_done[w] = n >= 32 * w + 32 ? 0 : n <= 32 * w ? ~0u : ~0u << (n - 32 * w);
  }
  ready.clear();
  block.done = 0;
  ++block_serial;
  reset_barriers();
  reset_shared(dynamic_bytes);
  block.fibers.resize(n);
  std::vector<unsigned> all(n);
  for (unsigned t = 0; t < n; ++t) start_fiber(block.fibers[all[t] = t], t);
  race::block_start(n, block_serial, launch_serial);
  for (auto h : block_hooks()) h();
  Fiber boot{};
  block.current = &boot;
  make_ready(all);
  const size_t first = g_config.order == Order::random ? rng() % n : 0;
  block.current = &block.fibers[ready[first]];
  ready.erase(ready.begin() + long(first));
  set_index(*block.current);
  race::enable(true);
  main_size = 0;
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(&main_fake, block.current->stack, kStackBytes);
  emu_switch(&main_sp, block.current->sp);
  __sanitizer_finish_switch_fiber(main_fake, nullptr, nullptr);
#else
  (void)main_fake;
  emu_switch(&main_sp, block.current->sp);
#endif
  race::enable(false);
}

std::vector<size_t> block_order(size_t blocks) {
  std::vector<size_t> ids(blocks);
  for (size_t i = 0; i < blocks; ++i)
    ids[i] = g_config.order == Order::reverse ? blocks - 1 - i : i;
  if (g_config.order == Order::random) std::shuffle(ids.begin(), ids.end(), rng);
  return ids;
}
}  // namespace

// ---- scheduler ----

void reschedule(bool dying) {
  if (ready.empty())
    for (auto h : idle_hooks())
      while (ready.empty() && h()) {  // asynchronous work lands as late as it can
      }
  if (ready.empty()) {
    if (block.done == block.threads) to_main();
    fail(deadlock_report());
  }
  const bool random = g_config.order == Order::random;
  const size_t i = random ? rng() % ready.size() : 0;
  const unsigned t = ready[i];
  if (random) {
    ready[i] = ready.back();
    ready.pop_back();
  } else {
    ready.pop_front();
  }
  Fiber* prev = block.current;
  block.current = &block.fibers[t];
  set_index(*block.current);
  if (block.current == prev) return;
  const int quiet = race::exchange_quiet(0);  // the caller's Quiet is for this fiber only
  switch_to(&prev->sp, &prev->fake_stack, block.current->sp, block.current->stack, kStackBytes,
            dying);
  race::exchange_quiet(quiet);
}

void make_ready(const std::vector<unsigned>& tids) {
  if (g_config.order == Order::reverse)
    ready.insert(ready.end(), tids.rbegin(), tids.rend());
  else
    ready.insert(ready.end(), tids.begin(), tids.end());
}
void make_ready(unsigned tid) { ready.push_back(tid); }

void park(const char* what, Site site) {
  Quiet q;
  Fiber& me = *block.current;
  me.what = what;
  me.site = site;
  me.barrier = kEngineBarrier;
  reschedule(false);
}

void unpark(std::vector<unsigned> tids) {
  for (unsigned t : tids) block.fibers[t].what = nullptr;
  if (g_config.order != Order::random) std::sort(tids.begin(), tids.end());
  make_ready(tids);
}

void yield() {
  if (ready.empty()) return;
  Quiet q;
  ready.push_back(current_tid());
  reschedule(false);
}

void fail(const std::string& message) {
  g_error = message;
  to_main();
}

void fatal(const std::string& what, Site site) {
  const std::string m = what + " (" + at(site) + ")";
  if (!block.current) throw std::runtime_error(m);
  fail(describe(current_tid()) + ": " + m);
}

std::vector<bool (*)()>& idle_hooks() {
  static std::vector<bool (*)()> v;
  return v;
}
std::vector<void (*)()>& block_hooks() {
  static std::vector<void (*)()> v;
  return v;
}

// ---- names, configuration ----

Config& config() { return g_config; }
std::string& last_error() {
  static std::string e;
  return e;
}
unsigned lane() { return current_tid() % 32; }

std::string at(Site s) {
  const char* slash = s.file ? strrchr(s.file, '/') : nullptr;
  return std::string(slash ? slash + 1 : s.file ? s.file : "?") + ":" + std::to_string(s.line);
}

std::string describe(unsigned t) {
  auto triple = [](unsigned x, unsigned y, unsigned z) {
    return "(" + std::to_string(x) + "," + std::to_string(y) + "," + std::to_string(z) + ")";
  };
  return "block " + triple(blockIdx.x, blockIdx.y, blockIdx.z) + " thread " +
         triple(t % blockDim.x, t / blockDim.x % blockDim.y, t / blockDim.x / blockDim.y) +
         " = warp " + std::to_string(t / 32) + " lane " + std::to_string(t % 32);
}

Quiet::Quiet() { race::pause(1); }
Quiet::~Quiet() { race::pause(-1); }
void note_access(const void* p, size_t n, bool write, bool atomic) {
  race::access(p, n, write, atomic, __builtin_return_address(0));
}

// ---- launch ----

void launch(void (*body)(void*), void* closure, dim3 grid, dim3 threads, size_t smem) {
  find_static_memory();
  catch_invalid_addresses();
  launch_frame = static_cast<char*>(__builtin_frame_address(0));
  const size_t n = size_t(threads.x) * threads.y * threads.z;
  if (!n || n > 1024 || !grid.x || !grid.y || !grid.z || grid.x > INT32_MAX || grid.y > 65535 ||
      grid.z > 65535)
    throw std::runtime_error("invalid launch configuration");
  if (smem > kDynamicSharedMax)
    throw std::runtime_error("too much dynamic shared memory: " + std::to_string(smem));
  kernel_body = body;
  kernel_closure = closure;
  dynamic_bytes = smem;
  block.threads = unsigned(n);
  gridDim = grid;
  blockDim = threads;
  rng.seed(g_config.seed);
  g_error.clear();
  ++launch_serial;
  ++launch_count();
  for (size_t i : block_order(size_t(grid.x) * grid.y * grid.z)) {
    blockIdx.x = unsigned(i % grid.x);
    blockIdx.y = unsigned(i / grid.x % grid.y);
    blockIdx.z = unsigned(i / grid.x / grid.y);
    run_block();
    block.current = nullptr;
    if (!g_error.empty()) throw std::runtime_error("emulated kernel: " + g_error);
  }
  const std::string r = race::report();
  if (!r.empty()) throw std::runtime_error("emulated kernel: " + r);
}

unsigned& launch_count() {
  static unsigned n = 0;
  return n;
}
}  // namespace emu

// What tests call through ctypes. order: 0 forward, 1 reverse, 2 random; async: 0 late, 1 early,
// 2 random.
extern "C" void emu_config(int order, int async, unsigned seed) {
  emu::config().order = emu::Order(order);
  emu::config().async = emu::Async(async);
  emu::config().seed = seed;
}
extern "C" const char* emu_last_error() { return emu::last_error().c_str(); }
extern "C" unsigned emu_launches() { return emu::launch_count(); }
#ifndef EMU_RACE
// Only the check flavour knows which buffers a launch may touch.
extern "C" void emu_allow(const void*, size_t) {}
extern "C" void emu_allow_none() {}
extern "C" int emu_checks() { return 0; }
#endif
