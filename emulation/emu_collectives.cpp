// SPDX-License-Identifier: Apache-2.0
// Warp collectives and block barriers: who has come, do they agree, what do they get. Tensor-core
// collectives follow the register layouts of the PTX ISA (mma.m16n8k16, ldmatrix).
#include "emu_rt.h"

namespace emu {
namespace {
struct Barrier {
  int arrived = 0, expected = 0;
  const char* what = nullptr;
  Site site;
  std::vector<unsigned> waiting;
  std::vector<int*> reduce;
};
Barrier barriers[16];

bool same_site(Site a, Site b) { return a.line == b.line && !strcmp(a.file, b.file); }

// Collects the arguments of all lanes in the mask. False while one is missing; fatal if one never
// comes or is in another collective that names this lane.
bool gather(const char* what, uint32_t mask, Site site, bool by_site, void** args) {
  const Fiber& me = *block.current;
  const unsigned l = me.tid % 32, w = me.tid & ~31u;
  bool complete = true;
  for (unsigned i = 0; i < 32; ++i) {
    if (!(mask >> i & 1)) continue;
    if (w + i >= block.threads)
      fatal(std::string(what) + ": the mask names lane " + std::to_string(i) +
                ", which the block does not have",
            site);
    const Fiber& f = block.fibers[w + i];
    if (f.done)
      fatal(
          std::string(what) + ": the mask names lane " + std::to_string(i) + ", which has returned",
          site);
    if (!f.what || f.barrier != kNoBarrier) {
      complete = false;
      continue;
    }
    const bool same =
        !strcmp(f.what, what) && f.mask == mask && (!by_site || same_site(f.site, site));
    if (!same && (f.mask >> l & 1))
      fatal(std::string("diverged warp: this lane is in ") + what + " at " + at(site) + ", lane " +
                std::to_string(i) + " in " + f.what + " at " + at(f.site),
            site);
    complete &= same;
    args[i] = f.arg;
  }
  return complete;
}
}  // namespace

void reset_barriers() {
  for (auto& b : barriers) b = Barrier();
}

void check_return(const Fiber& me) {
  for (auto& f : block.fibers)
    if (!f.done && f.what && f.tid / 32 == me.tid / 32 && f.barrier == kNoBarrier &&
        (f.mask >> (me.tid % 32) & 1))
      fatal("returns from the kernel while lane " + std::to_string(f.tid % 32) +
                " waits for it in " + f.what + " at " + at(f.site),
            Site{"kernel end", 0});
  const Barrier& b = barriers[0];
  if (b.what && b.expected == int(block.threads))
    fatal(std::string("returns from the kernel while other threads of the block wait for it in ") +
              b.what + " at " + at(b.site),
          Site{"kernel end", 0});
}

void warp_collective(const char* what, uint32_t mask, Site site, void* arg, Combine combine) {
  Quiet q;
  Fiber& me = *block.current;
  const unsigned l = me.tid % 32, w = me.tid & ~31u;
  if (!(mask >> l & 1)) fatal(std::string(what) + ": the calling lane is not in its mask", site);
  me.what = what;
  me.mask = mask;
  me.site = site;
  me.arg = arg;
  me.barrier = kNoBarrier;
  uint32_t& waiting = block.warp_waiting[w / 32];
  waiting |= 1u << l;
  if ((mask & ~waiting) && !(mask & block.warp_done[w / 32])) {
    reschedule(false);  // the last lane to come checks that all agree
    return;
  }
  void* args[32] = {};
  if (!gather(what, mask, site, config().sites && combine, args)) {
    reschedule(false);
    return;
  }
  if (combine)
    combine(args, mask);
  else
    race::join_warp(w, mask);  // only __syncwarp orders memory
  waiting &= ~mask;
  const bool back = config().order == Order::reverse;
  for (unsigned n = 0; n < 32; ++n) {
    const unsigned i = back ? 31 - n : n;
    if (!(mask >> i & 1)) continue;
    block.fibers[w + i].what = nullptr;
    if (i != l) make_ready(w + i);
  }
}

void block_barrier(const char* what, int id, int count, bool wait, Site site, int* reduce) {
  Quiet q;
  Barrier& b = barriers[id];
  const int expected = count ? count : int(block.threads);
  const bool check_site = wait && config().sites && id == 0;
  if (b.what &&
      (b.expected != expected || strcmp(b.what, what) || (check_site && !same_site(b.site, site))))
    fatal("mismatched barrier " + std::to_string(id) + ": this thread is in " + what + " at " +
              at(site) + ", others in " + b.what + " at " + at(b.site),
          site);
  if (!count && block.done)
    fatal(std::string(what) + ": " + std::to_string(block.done) +
              " threads of the block have already returned",
          site);
  if (!b.what) {
    b.what = what;
    b.site = site;
    b.expected = expected;
  }
  ++b.arrived;
  if (reduce) b.reduce.push_back(reduce);
  Fiber& me = *block.current;
  race::arrive(me.tid, id);
  if (b.arrived < expected) {
    if (!wait) return;
    me.what = what;
    me.site = site;
    me.barrier = id;
    b.waiting.push_back(me.tid);
    reschedule(false);
    return;
  }
  int sum = 0;
  for (int* r : b.reduce) sum += *r;
  for (int* r : b.reduce) *r = sum;
  std::vector<unsigned> go = b.waiting, joined = go;
  if (wait) joined.push_back(me.tid);
  race::join_barrier(id, joined);
  for (unsigned t : go) block.fibers[t].what = nullptr;
  if (config().order != Order::random) std::sort(go.begin(), go.end());
  b = Barrier();
  make_ready(go);
  if (wait && !go.empty()) yield();  // the last arrival must not always run first
}

// ---- tensor cores ----

namespace {
float bf16_of(uint32_t pair, int high) {
  const uint32_t u = high ? pair & 0xffff0000u : pair << 16;
  float f;
  memcpy(&f, &u, 4);
  return f;
}

float f16_of(uint32_t pair, int high) {
  const uint16_t u = high ? uint16_t(pair >> 16) : uint16_t(pair);
  __half h;
  memcpy(&h, &u, 2);
  return __half2float(h);
}

// widen(pair, i): element i of two
template <float (*widen)(uint32_t, int)>
void mma_combine(void** lanes, uint32_t) {
  float a[16][16], b[16][8], d[16][8];
  for (int i = 0; i < 32; ++i) {
    const auto* m = static_cast<MmaArg*>(lanes[i]);
    const int g = i / 4, t = i % 4;
    for (int h = 0; h < 2; ++h) {
      const int c = 2 * t + h;
      a[g][c] = widen(m->a[0], h);
      a[g + 8][c] = widen(m->a[1], h);
      a[g][c + 8] = widen(m->a[2], h);
      a[g + 8][c + 8] = widen(m->a[3], h);
      b[c][g] = widen(m->b[0], h);
      b[c + 8][g] = widen(m->b[1], h);
      d[g][c] = m->c[h];
      d[g + 8][c] = m->c[2 + h];
    }
  }
  for (int i = 0; i < 16; ++i)
    for (int k = 0; k < 16; ++k)
      for (int j = 0; j < 8; ++j) d[i][j] += a[i][k] * b[k][j];
  for (int i = 0; i < 32; ++i) {
    auto* m = static_cast<MmaArg*>(lanes[i]);
    const int g = i / 4, t = i % 4;
    for (int h = 0; h < 2; ++h) {
      m->c[h] = d[g][2 * t + h];
      m->c[2 + h] = d[g + 8][2 * t + h];
    }
  }
}

template <bool kTranspose>
void ldmatrix_combine(void** lanes, uint32_t) {
  const int n = static_cast<LdsmArg*>(lanes[0])->n;
  for (int j = 0; j < n; ++j) {
    uint16_t m[8][8];
    for (int r = 0; r < 8; ++r) memcpy(m[r], static_cast<LdsmArg*>(lanes[8 * j + r])->row, 16);
    for (int i = 0; i < 32; ++i) {
      const int g = i / 4, c = 2 * (i % 4);
      const uint16_t x = kTranspose ? m[c][g] : m[g][c], y = kTranspose ? m[c + 1][g] : m[g][c + 1];
      static_cast<LdsmArg*>(lanes[i])->r[j] = x | uint32_t(y) << 16;
    }
  }
}
}  // namespace

void mma_bf16(MmaArg& arg, Site site) {
  warp_collective("mma.sync.m16n8k16.bf16", ~0u, site, &arg, mma_combine<bf16_of>);
}

void mma_f16(MmaArg& arg, Site site) {
  warp_collective("mma.sync.m16n8k16.f16", ~0u, site, &arg, mma_combine<f16_of>);
}

void ldmatrix(LdsmArg& arg, bool trans, Site site) {
  if (int(lane()) < 8 * arg.n) {
    if (uintptr_t(arg.row) % 16) fatal("ldmatrix: row address is not a multiple of 16", site);
    if (classify(arg.row) != Space::shared)
      fatal("ldmatrix: row address is not in shared memory", site);
    race::access(arg.row, 16, false, false, __builtin_return_address(0));
    volatile char probe = *static_cast<const char*>(arg.row);  // where AddressSanitizer looks
    (void)probe;
  }
  warp_collective(trans ? "ldmatrix.trans" : "ldmatrix", ~0u, site, &arg,
                  trans ? ldmatrix_combine<true> : ldmatrix_combine<false>);
}
}  // namespace emu
