// SPDX-License-Identifier: Apache-2.0
// Memory of the emulated GPU: shared memory between red zones, what an address is, cp.async, and
// invalid addresses as errors instead of crashes.
#include <link.h>
#include <signal.h>
#include <ucontext.h>

#include <cstdio>
#include <map>

#include "emu_rt.h"

namespace emu {
namespace {
constexpr size_t kStaticSharedMax = 256 << 10, kRedZone = 64;

alignas(1024) char dynamic_arena[kDynamicSharedMax + 1024];
alignas(1024) char static_arena[kStaticSharedMax];
size_t dynamic_size, static_used;
std::map<const void*, char*>
    static_vars;  // key of the declaration -> [size ... red zone][variable]

struct Range {
  char *lo, *hi;
  bool has(const char* p) const { return p >= lo && p < hi; }
};
const Range kDynamic{dynamic_arena, dynamic_arena + sizeof dynamic_arena};
const Range kStatic{static_arena, static_arena + sizeof static_arena};

// Where this library's variables are: a plain __shared__ variable is one of them.
std::vector<Range> writable, read_only;
int scan_module(dl_phdr_info* info, size_t, void* want) {
  std::vector<Range> w, r;
  bool mine = false;
  for (int i = 0; i < info->dlpi_phnum; ++i) {
    const auto& h = info->dlpi_phdr[i];
    if (h.p_type != PT_LOAD) continue;
    char* lo = reinterpret_cast<char*>(info->dlpi_addr + h.p_vaddr);
    const Range x{lo, lo + h.p_memsz};
    mine |= x.has(static_cast<char*>(want));
    (h.p_flags & PF_W ? w : r).push_back(x);
  }
  if (mine) {
    writable = w;
    read_only = r;
  }
  return mine;
}
}  // namespace

void find_static_memory() {
  if (writable.empty()) dl_iterate_phdr(scan_module, reinterpret_cast<void*>(&find_static_memory));
}

Space classify(const void* p) {
  auto c = static_cast<const char*>(p);
  const Fiber& me = *block.current;
  if (c >= me.stack && c < me.stack + kStackBytes) return Space::own_stack;
  if (kDynamic.has(c) || kStatic.has(c)) return Space::shared;
  for (auto& r : writable)
    if (r.has(c)) return Space::host_static;
  if (c < block.stacks_lo || c >= block.stacks_hi) return Space::global;
  for (auto& f : block.fibers)
    if (c >= f.stack && c < f.stack + kStackBytes) return Space::other_stack;
  return Space::global;
}

bool shared_in_bounds(const void* p, size_t n) {
  auto c = static_cast<const char*>(p);
  if (kDynamic.has(c)) return c + n <= dynamic_arena + dynamic_size;
  if (!kStatic.has(c)) return true;
  for (auto& v : static_vars) {
    const char* lo = v.second + kRedZone;
    if (c >= lo && c + n <= lo + *reinterpret_cast<size_t*>(v.second)) return true;
  }
  return false;
}

bool host_memory(const void* p) {
  auto c = static_cast<const char*>(p);
  for (auto& r : read_only)
    if (r.has(c)) return true;
  return c >= launch_frame - 4096 && c < launch_frame + (1 << 20);
}

void misaligned(const char* what, size_t bytes, Site site) {
  Quiet q;
  fatal(std::string(what) + " of " + std::to_string(bytes) + " bytes is misaligned", site);
}

// ---- shared memory ----

void reset_shared(size_t dynamic_bytes) {
  dynamic_size = dynamic_bytes;
  static_used = kRedZone;
  static_vars.clear();
  ASAN_UNPOISON_MEMORY_REGION(dynamic_arena, sizeof dynamic_arena);
  ASAN_UNPOISON_MEMORY_REGION(static_arena, sizeof static_arena);
  memset(dynamic_arena, 0xff, dynamic_size);
  ASAN_POISON_MEMORY_REGION(dynamic_arena + dynamic_size, sizeof dynamic_arena - dynamic_size);
  ASAN_POISON_MEMORY_REGION(static_arena, sizeof static_arena);
}

char* dynamic_shared(size_t need, Site site) {
  Quiet q;
  if (need > dynamic_size)
    fatal("the kernel needs " + std::to_string(need) +
              " bytes of dynamic shared memory, the launch gave " + std::to_string(dynamic_size),
          site);
  return dynamic_arena;
}

void* static_shared(const void* key, size_t n, size_t align) {
  Quiet q;
  char*& v = static_vars[key];
  if (!v) {
    const size_t o = (static_used + kRedZone + align - 1) / align * align;
    if (o + n + kRedZone > kStaticSharedMax) fatal("too much static shared memory", {"", 0});
    v = static_arena + o - kRedZone;
    ASAN_UNPOISON_MEMORY_REGION(v, sizeof(size_t));
    *reinterpret_cast<size_t*>(v) = n;
    ASAN_POISON_MEMORY_REGION(v, kRedZone);
    ASAN_UNPOISON_MEMORY_REGION(static_arena + o, n);
    memset(static_arena + o, 0xff, n);
    static_used = o + n + kRedZone;
  }
  return v + kRedZone;
}

uint32_t shared_offset(const void* p) {
  auto c = static_cast<const char*>(p);
  if (!kDynamic.has(c))
    fatal("a shared-memory address is needed, this is none of dynamic shared memory", {"", 0});
  return uint32_t(c - dynamic_arena);
}
char* shared_at(uint32_t offset) { return dynamic_arena + offset; }

// ---- cp.async ----

static void complete_copy(const PendingCopy& p) {
  Quiet q;
  memcpy(p.dst, p.src, size_t(p.src_bytes));
  memset(p.dst + p.src_bytes, 0, size_t(p.bytes - p.src_bytes));
}

bool copies_early() {
  const Async a = config().async;
  return a == Async::early || (a == Async::random && (rng() & 1));
}

void cp_async(void* dst, const void* src, int n, int src_n, Site site) {
  if (uintptr_t(dst) % unsigned(n) || (src_n && uintptr_t(src) % unsigned(n)))
    misaligned("cp.async", size_t(n), site);
  if (classify(dst) != Space::shared)
    fatal("cp.async into something that is not shared memory", site);
  void* pc = __builtin_return_address(0);
  race::access(dst, size_t(n), true, false, pc);
  if (src_n) race::access(src, size_t(src_n), false, false, pc);
  Fiber& me = *block.current;
  const PendingCopy p{static_cast<char*>(dst), static_cast<const char*>(src), n, src_n, me.group};
  if (copies_early())
    complete_copy(p);
  else
    me.pending.push_back(p);
  race::async_begin(me.tid, dst, n, me.group);
}

void cp_async_commit() { ++block.current->group; }

void cp_async_wait(int pending, bool all) {
  Fiber& me = *block.current;
  const int upto = all ? me.group + 1 : me.group - pending;
  auto& v = me.pending;
  size_t keep = 0;
  for (const PendingCopy& p : v) {
    if (p.group < upto)
      complete_copy(p);
    else
      v[keep++] = p;
  }
  v.resize(keep);
  race::async_end(me.tid, upto);
}

// ---- invalid addresses ----

#if !defined(__SANITIZE_ADDRESS__)
// An invalid address (or a full stack) ends the launch with an error, not the process.
static void on_segv(int, siginfo_t* info, void* context) {
  if (!block.current || !block.threads) {
    signal(SIGSEGV, SIG_DFL);
    return;
  }
  sigset_t s;
  sigemptyset(&s);
  sigaddset(&s, SIGSEGV);
  sigprocmask(SIG_UNBLOCK, &s, nullptr);
  char m[80];
  snprintf(m, sizeof m, "invalid address %p, accessed at ", info->si_addr);
  const auto pc = static_cast<ucontext_t*>(context)->uc_mcontext.gregs[REG_RIP];
  fail(describe(current_tid()) + ": " + m + race::where(reinterpret_cast<void*>(pc)));
}
void catch_invalid_addresses() {
  alignas(16) static char alternate[65536];
  static bool done = false;
  if (done) return;
  done = true;
  stack_t st{};
  st.ss_sp = alternate;
  st.ss_size = sizeof alternate;
  sigaltstack(&st, nullptr);
  struct sigaction sa{};
  sa.sa_sigaction = on_segv;
  sa.sa_flags = SA_SIGINFO | SA_ONSTACK;
  sigaction(SIGSEGV, &sa, nullptr);
}
#else
void catch_invalid_addresses() {}
#endif
}  // namespace emu
