// SPDX-License-Identifier: Apache-2.0
// Data races, accesses out of bounds, misaligned accesses and reads of unwritten shared memory.
// Kernels are compiled with -fsanitize=thread, but linked with the __tsan_* functions below instead
// of libtsan: the compiler announces every load and store, we check them by the GPU's rules.
// Happens-before is tracked with one vector clock per CUDA thread: __syncthreads and named barriers
// order all their threads, __syncwarp its lanes; shuffles, votes and mma order nothing (as in
// CUDA).
#include <dlfcn.h>

#include <cstdio>
#include <map>
#include <memory>
#include <set>
#include <unordered_map>

#include "emu_rt.h"

namespace emu {
namespace race {
namespace {
struct Cell {               // one byte of memory
  uint32_t launch, serial;  // when the rest was last valid
  uint32_t wclk, rclk[2];
  uint16_t wtid, rtid[2];
  bool wrote, watomic, pending, other_wrote, other_atomic, other_read;
  uint8_t reads;
  void *wpc, *rpc;
};
constexpr int kPageBits = 12;
using Clock = std::vector<uint32_t>;
struct Copy {
  char* dst;
  int n, group;
  void* pc;
};

std::unordered_map<uintptr_t, std::unique_ptr<Cell[]>> pages;
uintptr_t last_page = ~uintptr_t(0);
Cell* last_cells;
std::vector<Clock> clocks;
std::map<int, Clock> barrier_clocks;
std::vector<std::vector<Copy>> copies;
// [begin, end) of the global memory that kernels may touch; empty: no check.
std::map<uintptr_t, uintptr_t> buffers;
bool on;
int quiet = 1;
unsigned threads, serial, launch_no;
std::map<std::string, int> found;
std::set<std::pair<void*, void*>> told;  // pairs of code addresses already reported

Cell& cell(uintptr_t a) {
  const uintptr_t p = a >> kPageBits;
  if (p != last_page) {
    auto& page = pages[p];
    if (!page) page.reset(new Cell[1 << kPageBits]());
    last_page = p;
    last_cells = page.get();
  }
  return last_cells[a & ((1 << kPageBits) - 1)];
}

void join(Clock& a, const Clock& b) {
  for (unsigned i = 0; i < threads; ++i) a[i] = std::max(a[i], b[i]);
}

// Innermost source line that is the kernel's own: neither CuTe's, nor ours, nor a thin wrapper's.
std::string line_of(void* pc) {
  static std::map<void*, std::string> known;
  static const char* const kWrappers[] = {
      "/cute/",       "/emu.h", "/emu_intrinsics.h", "/portable.cuh", "/cuda_bf16.h",
      "/cuda_fp16.h", "??"};
  std::string& s = known[pc];
  if (!s.empty()) return s;
  s = "?";
  Dl_info d;
  if (!dladdr(pc, &d) || !d.dli_fname) return s;
  char cmd[600], buf[600];
  snprintf(cmd, sizeof cmd, "addr2line -i -e '%s' %#zx", d.dli_fname,
           size_t(pc) - size_t(d.dli_fbase) - 1);
  FILE* f = popen(cmd, "r");
  if (!f) return s;
  while (fgets(buf, sizeof buf, f)) {
    std::string l(buf);
    l.erase(std::min(l.find(" ("), l.find('\n')));
    if (s == "?") s = l;
    const bool wrapper = std::any_of(std::begin(kWrappers), std::end(kWrappers),
                                     [&](const char* w) { return l.find(w) != l.npos; });
    if (!wrapper) {
      s = l.substr(l.rfind('/') + 1);
      break;
    }
  }
  pclose(f);
  return s;
}

void add(const std::string& m) { ++found[m]; }
bool first_time(void* a, void* b) { return told.insert({a, b}).second; }
const char* verb(bool write, bool atomic) {
  return atomic ? "an atomic" : write ? "a write" : "a read";
}

void report_race(const char* a, void* pa, unsigned ta, const char* b, void* pb, unsigned tb,
                 bool shared) {
  if (!first_time(pa, pb)) return;
  add(std::string("race in ") + (shared ? "shared" : "global") + " memory: " + a + " at " +
      line_of(pa) + " by thread " + std::to_string(ta) + " and " + b + " at " + line_of(pb) +
      " by " + describe(tb) + ", with no barrier between them");
}

bool in_buffers(const void* p, size_t n) {
  if (buffers.empty() || host_memory(p)) return true;
  auto it = buffers.upper_bound(uintptr_t(p));
  return it != buffers.begin() && uintptr_t(p) + n <= std::prev(it)->second;
}

// What ends the launch before the access happens; empty if nothing does.
std::string forbidden(const void* p, size_t n, Space space) {
  if (space == Space::other_stack) return " of another thread's local memory";
  if (space == Space::shared && !shared_in_bounds(p, n))
    return " outside the block's shared memory";
  if (space == Space::global && !in_buffers(p, n)) return " outside every buffer of the launch";
  return "";
}

struct Access {
  bool write, atomic, shared;
  unsigned tid;
  void* pc;
};

// Global memory last touched by another block of this launch: those accesses are concurrent.
void check_other_blocks(Cell& c, const Access& a) {
  if (c.serial != serial) {
    if (c.wrote) c.other_atomic = c.watomic && (!c.other_wrote || c.other_atomic);
    c.other_wrote |= c.wrote;
    c.other_read |= c.reads > 0;
    c.wrote = false;
    c.reads = 0;
    c.serial = serial;
  }
  const bool conflict =
      (c.other_wrote && !(a.atomic && c.other_atomic)) || (a.write && c.other_read);
  if (conflict && first_time(a.pc, c.wpc))
    add(std::string("race in global memory between blocks: ") + verb(a.write, a.atomic) + " at " +
        line_of(a.pc) + " by " + describe(a.tid) + " of what another block " +
        (c.other_wrote ? "wrote at " + line_of(c.wpc) : "read at " + line_of(c.rpc)));
}

void check_block(Cell& c, const Access& a) {
  const Clock& mine = clocks[a.tid];
  const char* what = verb(a.write, a.atomic);
  if (c.pending && !(a.write && a.atomic)) {
    if (first_time(a.pc, &c) && first_time(a.pc, &pages))
      add(std::string(what) + " at " + line_of(a.pc) + " by " + describe(a.tid) +
          " touches the destination of a cp.async (issued at " + line_of(c.wpc) +
          ") that has not been waited for");
    return;
  }
  if (c.wrote && c.wtid != a.tid && c.wclk > mine[c.wtid] && !(a.atomic && c.watomic))
    report_race(c.watomic ? "an atomic" : "a write", c.wpc, c.wtid, what, a.pc, a.tid, a.shared);
  if (!a.write) return;
  for (int i = 0; i < c.reads; ++i)
    if (c.rtid[i] != a.tid && c.rclk[i] > mine[c.rtid[i]])
      report_race("a read", c.rpc, c.rtid[i], what, a.pc, a.tid, a.shared);
}

void record(Cell& c, const Access& a) {
  const uint32_t now = clocks[a.tid][a.tid];
  if (a.write) {
    c.wrote = true;
    c.watomic = a.atomic;
    c.wtid = uint16_t(a.tid);
    c.wclk = now;
    c.wpc = a.pc;
    c.reads = 0;
    return;
  }
  // Keep this thread's last read and one other's.
  int i = 1;
  if (c.reads && c.rtid[0] == a.tid)
    i = 0;
  else if (c.reads < 2)
    i = c.reads++;
  c.rtid[i] = uint16_t(a.tid);
  c.rclk[i] = now;
  c.rpc = a.pc;
}
}  // namespace

// ---- what the scheduler and the collectives tell ----

std::string where(void* pc) { return line_of(static_cast<char*>(pc) + 1); }
void enable(bool e) {
  on = e;
  quiet = 0;
}
void pause(int delta) { quiet += delta; }
int exchange_quiet(int q) {
  std::swap(q, quiet);
  return q;
}

void block_start(unsigned n, unsigned block_serial, unsigned launch) {
  if (launch != launch_no) {
    found.clear();
    told.clear();
  }
  threads = n;
  serial = block_serial;
  launch_no = launch;
  barrier_clocks.clear();
  clocks.assign(n, Clock(n, 0));
  copies.assign(n, {});
  for (unsigned i = 0; i < n; ++i) clocks[i][i] = 1;
}

void join_warp(unsigned first, uint32_t mask) {
  // Members of a warp differ from each other in few entries, but any thread may have joined any
  // other: take the maximum over all.
  Clock j(threads, 0);
  for (unsigned i = 0; i < 32; ++i)
    if (mask >> i & 1) join(j, clocks[first + i]);
  for (unsigned i = 0; i < 32; ++i)
    if (mask >> i & 1) {
      clocks[first + i] = j;
      ++clocks[first + i][first + i];
    }
}
void arrive(unsigned t, int b) {
  Clock& v = barrier_clocks[b];
  v.resize(threads, 0);
  join(v, clocks[t]);
  ++clocks[t][t];
}
void acquire(unsigned t, int b) {
  Clock& v = barrier_clocks[b];
  v.resize(threads, 0);
  join(clocks[t], v);
}
void join_barrier(int b, const std::vector<unsigned>& waiters) {
  for (unsigned t : waiters) {
    join(clocks[t], barrier_clocks[b]);
    ++clocks[t][t];
  }
  barrier_clocks.erase(b);
}

void access(const void* p, size_t n, bool write, bool atomic, void* pc) {
  if (!on || quiet > 0) return;
  const Space space = classify(p);
  if (space == Space::own_stack) return;
  ++quiet;
  const Access a{write, atomic, space == Space::shared, current_tid(), pc};
  const std::string bad = forbidden(p, n, space);
  if (!bad.empty())
    fatal(std::string(verb(write, atomic)) + " of " + std::to_string(n) + " bytes" + bad + " at " +
              line_of(pc),
          {"see there", 0});
  const bool per_block = space != Space::global;
  for (uintptr_t b = uintptr_t(p), e = b + n; b < e; ++b) {
    Cell& c = cell(b);
    if (c.launch != launch_no || (per_block && c.serial != serial)) {
      c = Cell();
      c.launch = launch_no;
      c.serial = serial;
    }
    check_other_blocks(c, a);
    check_block(c, a);
    if (!write && a.shared && !c.wrote && first_time(pc, &found))
      add("a read of shared memory that no thread of the block has written, at " + line_of(pc) +
          " by " + describe(a.tid));
    record(c, a);
  }
  --quiet;
}

// A load or store of 2, 4, 8 or 16 bytes as one instruction: the GPU wants its address a multiple.
void aligned_access(const void* p, size_t n, bool write, void* pc) {
  if (on && quiet <= 0 && uintptr_t(p) % n) {
    ++quiet;
    fatal(std::string(verb(write, false)) + " of " + std::to_string(n) +
              " bytes is misaligned, at " + line_of(pc),
          {"see there", 0});
  }
  access(p, n, write, false, pc);
}

void async_begin(unsigned t, void* dst, int n, int group) {
  if (!on) return;
  void* pc = cell(uintptr_t(dst)).wpc;  // noted as a write just before
  copies[t].push_back({static_cast<char*>(dst), n, group, pc});
  for (int i = 0; i < n; ++i) cell(uintptr_t(dst) + unsigned(i)).pending = true;
}
void async_end(unsigned t, int upto) {
  if (!on) return;
  auto& v = copies[t];
  size_t keep = 0;
  for (auto& c : v) {
    if (c.group >= upto) {
      v[keep++] = c;
      continue;
    }
    for (int i = 0; i < c.n; ++i) cell(uintptr_t(c.dst) + unsigned(i)).pending = false;
    access(c.dst, size_t(c.n), true, false, c.pc);  // the write is only over now
  }
  v.resize(keep);
}

std::string report() {
  std::string r;
  int n = 0;
  for (auto& f : found)
    if (n++ < 8) r += "\n    " + f.first;
  return r.empty() ? r : std::to_string(found.size()) + " findings:" + r;
}
}  // namespace race
}  // namespace emu

extern "C" void emu_allow(const void* p, size_t n) {
  if (n) emu::race::buffers[uintptr_t(p)] = uintptr_t(p) + n;
}
extern "C" void emu_allow_none() {
  emu::race::buffers.clear();
  emu::race::buffers[0] = 0;  // an empty set is not "no check"
}
extern "C" int emu_checks() { return 1; }

// ---- what the compiler calls ----

#define EMU_TSAN(N)                                                      \
  extern "C" void __tsan_read##N(void* p) {                              \
    emu::race::aligned_access(p, N, false, __builtin_return_address(0)); \
  }                                                                      \
  extern "C" void __tsan_write##N(void* p) {                             \
    emu::race::aligned_access(p, N, true, __builtin_return_address(0));  \
  }
EMU_TSAN(1)
EMU_TSAN(2)
EMU_TSAN(4)
EMU_TSAN(8)
EMU_TSAN(16)
extern "C" void __tsan_read_range(void* p, unsigned long n) {
  emu::race::access(p, n, false, false, __builtin_return_address(0));
}
extern "C" void __tsan_write_range(void* p, unsigned long n) {
  emu::race::access(p, n, true, false, __builtin_return_address(0));
}
extern "C" void __tsan_init() {}
extern "C" void __tsan_func_entry(void*) {}
extern "C" void __tsan_func_exit() {}
extern "C" void __tsan_vptr_update(void**, void*) {}
extern "C" void __tsan_vptr_read(void**) {}
