// SPDX-License-Identifier: Apache-2.0
#include "emu_sm90.h"

#include <cuda.h>

#include <deque>
#include <map>

#include "emu_rt.h"

namespace emu {
namespace {
// ---- mbarrier: phase, arrivals still missing, bytes still missing ----
struct Mbar {
  int count, missing;
  long tx;
  unsigned phase;
  std::vector<unsigned> waiting;
};
std::map<uint64_t*, Mbar> mbars;
struct Tma {
  std::vector<int32_t> coord;
  char* dst;
  uint64_t* bar;
  struct Map* map;
};
std::deque<Tma> tmas;
// ---- a tensor map, as our cuTensorMapEncodeTiled lays it out in the 128 opaque bytes. CUTLASS 4.7
// clears bit 21 of the second word for tensors under 128 KiB (a driver work-around), so nothing of
// ours is in the first 16 bytes. ----
struct Map {
  uint64_t touched[2], magic;
  char* base;
  uint32_t dim[5], stride[5];
  uint16_t box[5], rank, elem, swizzle;
};
static_assert(sizeof(Map) <= sizeof(CUtensorMap));
constexpr uint64_t kMagic = 0x656d752d746d6170;
std::deque<Map> kept;  // copies: the kernel's parameter may be gone when the engine gets to it

struct Op {
  WgmmaArg lane[128];
  bool done;
};
struct Group {
  std::vector<unsigned> in;
  std::vector<const WgmmaArg*> args;
  const char* what;
  Site site;
  std::deque<std::vector<Op*>> committed;
  std::vector<Op*> open;
};
std::map<unsigned, Group> groups;

Mbar& find(uint64_t* bar, Site s) {
  auto it = mbars.find(bar);
  if (it == mbars.end()) fatal("mbarrier used before it is initialised", s);
  return it->second;
}
void settle(Mbar& m) {
  if (m.missing || m.tx) return;
  ++m.phase;
  m.missing = m.count;
  auto w = m.waiting;
  m.waiting.clear();
  unpark(w);
}
uint32_t swizzle(uint32_t a, uint32_t bits) {
  return a ^ (a >> 3 & ((1u << bits) - 1) << 4);
}  // 16-byte chunks within 2^bits rows of 128 bytes

void run_tma(const Tma& t) {
  Quiet q;
  const Map& m = *t.map;
  size_t bytes = 0;
  uint32_t base = shared_offset(t.dst), bits = m.swizzle;  // 0, 1, 2, 3 for none, 32B, 64B, 128B
  uint32_t i[5] = {};
  size_t total = 1;
  for (uint32_t r = 0; r < m.rank; ++r) total *= m.box[r];
  for (size_t n = 0; n < total; ++n, bytes += m.elem) {
    const char* src = m.base;
    bool ok = true;
    for (uint32_t r = 0; r < m.rank; ++r) {
      int64_t c = int64_t(t.coord[r]) + i[r];
      ok &= c >= 0 && c < int64_t(m.dim[r]);
      src += c * int64_t(m.stride[r]);
    }
    char* dst = shared_at(swizzle(uint32_t(base + bytes), bits));
    if (ok)
      memcpy(dst, src, m.elem);
    else
      memset(dst, 0, m.elem);
    for (uint32_t r = 0; r < m.rank && ++i[r] == m.box[r]; ++r) i[r] = 0;
  }
  auto& b = mbars[t.bar];
  b.tx -= long(bytes);
  settle(b);
}
float bf16(const char* p) {
  uint16_t h;
  memcpy(&h, p, 2);
  uint32_t u = uint32_t(h) << 16;
  float f;
  memcpy(&f, &u, 4);
  return f;
}
// Element (row, k) of a K-major operand: 8-row groups SBO apart, 2^bits-chunk swizzle on the
// absolute address.
float element(uint64_t desc, int row, int k) {
  uint32_t start = uint32_t(desc & 0x3fff) << 4, sbo = uint32_t(desc >> 32 & 0x3fff) << 4,
           type = uint32_t(desc >> 62);
  uint32_t bits = type == 0 ? 0 : 4 - type, width = 16u << bits;  // type 1, 2, 3: 128, 64, 32 bytes
  uint32_t lbo = uint32_t(desc >> 16 & 0x3fff) << 4, byte = uint32_t(2 * k);
  uint32_t a = start + uint32_t(row / 8) * sbo +
               (type ? uint32_t(row % 8) * width + byte
                     : uint32_t(row % 8) * 16 + byte / 16 * lbo + byte % 16);
  return bf16(shared_at(swizzle(a, bits)));
}
void run_wgmma(Op& op) {
  Quiet q;
  op.done = true;
  const WgmmaArg& o = op.lane[0];
  static float a[64][16], b[16][256], d[64][256];
  for (int i = 0; i < 64; ++i)
    for (int k = 0; k < 16; ++k) a[i][k] = float(o.scale_a) * element(o.a, i, k);
  for (int j = 0; j < o.n; ++j)
    for (int k = 0; k < 16; ++k) b[k][j] = float(o.scale_b) * element(o.b, j, k);
  auto each = [&](auto f) {
    for (int t = 0; t < 128; ++t)
      for (int r = 0; r < o.n / 2; ++r)
        f(d[16 * (t / 32) + t % 32 / 4 + (r & 2 ? 8 : 0)][8 * (r / 4) + 2 * (t % 4) + (r & 1)],
          *op.lane[t].d[r]);
  };
  each([&](float& m, float& reg) { m = o.zero ? 0.f : reg; });
  for (int i = 0; i < 64; ++i)
    for (int k = 0; k < 16; ++k)
      for (int j = 0; j < o.n; ++j) d[i][j] += a[i][k] * b[k][j];
  each([&](float& m, float& reg) { reg = m; });
}
// All 128 threads of a warpgroup meet; the last one runs f.
template <class F>
void meet(const char* what, Site site, const WgmmaArg* arg, F f) {
  Quiet q;
  unsigned t = current_tid();
  Group& g = groups[t / 128];
  if (!g.in.empty() && (strcmp(g.what, what) || g.site.line != site.line))
    fatal(std::string("diverged warpgroup: this thread is in ") + what + ", others in " + g.what,
          site);
  g.what = what;
  g.site = site;
  g.in.push_back(t);
  g.args.push_back(arg);
  if (g.in.size() < 128) {
    park(what, site);
    return;
  }
  auto in = g.in;
  auto args = g.args;
  g.in.clear();
  g.args.clear();
  f(g, in, args);
  in.pop_back();
  unpark(in);
}
bool idle() {
  if (tmas.empty()) return false;
  Tma t = tmas.front();
  tmas.pop_front();
  run_tma(t);
  return true;
}
void reset() {
  mbars.clear();
  tmas.clear();
  kept.clear();
  groups.clear();
}
struct Hook {
  Hook() {
    idle_hooks().push_back(idle);
    block_hooks().push_back(reset);
  }
} hook;
}  // namespace

void mbar_init(uint64_t* bar, int count, Site s) {
  Quiet q;
  shared_offset(bar);
  if (count < 1) fatal("mbarrier count", s);
  mbars[bar] = Mbar{count, count, 0, 0, {}};
}
void mbar_arrive(uint64_t* bar, uint32_t bytes, Site s) {
  Quiet q;
  Mbar& m = find(bar, s);
  if (!m.missing) fatal("more arrivals at an mbarrier than its count", s);
  m.tx += bytes;
  --m.missing;
  race::arrive(current_tid(), int(shared_offset(bar)) + 1000);
  settle(m);
}
bool mbar_test(uint64_t* bar, uint32_t parity, Site s) {
  bool ok = (find(bar, s).phase & 1) != parity;
  if (ok)
    race::acquire(current_tid(), int(shared_offset(bar)) + 1000);
  else
    yield();
  return ok;
}
void mbar_wait(uint64_t* bar, uint32_t parity, Site s) {
  Quiet q;
  while ((find(bar, s).phase & 1) == parity) {
    find(bar, s).waiting.push_back(current_tid());
    park("mbarrier wait", s);
  }
  race::acquire(current_tid(), int(shared_offset(bar)) + 1000);
}
void tma_load(const void* tm, uint64_t* bar, void* dst, const int32_t* coord, int rank, Site s) {
  Map m;
  memcpy(&m, tm, sizeof m);
  if (m.magic != kMagic || int(m.rank) != rank) fatal("bad tensor map", s);
  if (shared_offset(dst) % 128) fatal("TMA destination is not 128-byte aligned", s);
  find(bar, s);
  size_t bytes = m.elem;
  for (int r = 0; r < rank; ++r) bytes *= m.box[r];
  race::access(dst, bytes, true, false, __builtin_return_address(0));
  race::arrive(current_tid(),
               int(shared_offset(bar)) + 1000);  // who waits for the bytes sees this write
  Quiet q;
  kept.push_back(m);
  Tma t{std::vector<int32_t>(coord, coord + rank), static_cast<char*>(dst), bar, &kept.back()};
  if (copies_early())
    run_tma(t);
  else
    tmas.push_back(t);
}
void wgmma(const WgmmaArg& arg, Site s) {
  if (arg.major_a || arg.major_b) fatal("wgmma: only K-major operands are emulated", s);
  meet("wgmma.mma_async", s, &arg,
       [&](Group& g, const std::vector<unsigned>& in, const std::vector<const WgmmaArg*>& args) {
         Op* op = new Op;
         for (size_t i = 0; i < 128; ++i) {
           if (args[i]->a != arg.a || args[i]->b != arg.b)
             fatal("wgmma: the threads of the warpgroup give different descriptors", s);
           op->lane[in[i] % 128] = *args[i];
         }
         op->done = false;
         if (copies_early()) {
           for (Op* o : g.open)
             if (!o->done) run_wgmma(*o);
           run_wgmma(*op);
         }  // in order
         g.open.push_back(op);
       });
}
void wgmma_fence(Site s) {
  meet("wgmma.fence", s, nullptr, [](Group&, auto&, auto&) {});
}
void wgmma_commit(Site s) {
  meet("wgmma.commit_group", s, nullptr, [](Group& g, auto&, auto&) {
    g.committed.push_back(g.open);
    g.open.clear();
  });
}
void wgmma_wait(int pending, Site s) {
  meet("wgmma.wait_group", s, nullptr, [=](Group& g, auto&, auto&) {
    while (int(g.committed.size()) > pending) {
      for (Op* o : g.committed.front()) {
        if (!o->done) run_wgmma(*o);
        delete o;
      }
      g.committed.pop_front();
    }
  });
}
}  // namespace emu

// Replaces the driver's: keeps the parameters for run_tma.
extern "C" CUresult cuTensorMapEncodeTiled(CUtensorMap* out, CUtensorMapDataType type,
                                           cuuint32_t rank, void* base, const cuuint64_t* dim,
                                           const cuuint64_t* stride, const cuuint32_t* box,
                                           const cuuint32_t* elem_stride, CUtensorMapInterleave il,
                                           CUtensorMapSwizzle sw, CUtensorMapL2promotion,
                                           CUtensorMapFloatOOBfill) {
  static const uint32_t size[] = {1, 2, 4, 4, 8, 8, 2, 4, 8, 2};
  if (rank < 1 || rank > 5 || il != CU_TENSOR_MAP_INTERLEAVE_NONE || uintptr_t(base) % 16 ||
      unsigned(type) >= 10 || unsigned(sw) > 3)
    return CUDA_ERROR_INVALID_VALUE;
  emu::Map m{};
  m.magic = emu::kMagic;
  m.base = static_cast<char*>(base);
  m.rank = uint16_t(rank);
  m.elem = uint16_t(size[type]);
  m.swizzle = uint16_t(sw);
  for (uint32_t r = 0; r < rank; ++r) {
    m.dim[r] = uint32_t(dim[r]);
    m.box[r] = uint16_t(box[r]);
    m.stride[r] = uint32_t(r ? stride[r - 1] : m.elem);
    if (elem_stride[r] != 1 || box[r] > 256 || (r && stride[r - 1] >> 32) ||
        (r && stride[r - 1] % 16))
      return CUDA_ERROR_INVALID_VALUE;
  }
  if (sw != CU_TENSOR_MAP_SWIZZLE_NONE && box[0] * m.elem > 16u << unsigned(sw))
    return CUDA_ERROR_INVALID_VALUE;
  memcpy(out, &m, sizeof m);
  return CUDA_SUCCESS;
}
extern "C" cudaError_t cudaDriverGetVersion(int* v) {
  *v = 13000;
  return cudaSuccess;
}
