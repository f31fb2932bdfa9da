// SPDX-License-Identifier: Apache-2.0
// Loads, stores, and what converts or hints at addresses.
#include <sstream>

#include "ptx/addresses.h"
#include "ptx/opcode.h"

namespace ptx {

[[gnu::noinline, gnu::cold]] void misaligned(u64 address, int lane, size_t bytes) {
  std::ostringstream s;
  s << "lane " << lane << ": address 0x" << std::hex << address << " is not a multiple of "
    << std::dec << bytes;
  throw Error(s.str());
}
[[gnu::noinline, gnu::cold]] void outside_local(u64 offset, size_t bytes, size_t size) {
  throw Error("local memory: offset " + std::to_string(offset) + " + " + std::to_string(bytes) +
              " of " + std::to_string(size));
}

namespace {

constexpr size_t kMostBytes = 32;  // of an access

bool is_private(const Instruction& i) { return i.space == Space::local || i.space == Space::param; }

// The pointers of all lanes, seen by the checker and the profile.
void locate(Warp& w, const Instruction& i, const Operand& address, size_t bytes, Access kind,
            char** p) {
  each(w.mask, [&](int l) { p[l] = pointer(w, i, address, l, bytes); });
  if (is_private(i)) return;
  if (w.block->checker || on_access) each(w.mask, [&](int l) { w.touch(l, p[l], bytes, kind); });
  if (w.block->profile) count_request(w, i, w.mask, p, bytes, kind);
}

template <class T>
void load(Warp& w, const Instruction& i) {
  char* p[kLanes];
  const size_t bytes = sizeof(T) * size_t(i.count);
  locate(w, i, i.o[i.count], bytes, {.reads = true, .strong = i.strong, .nc = i.nc}, p);
  each(w.mask, [&](int l) {
    T v[kMostBytes / sizeof(T)];
    memcpy(v, p[l], bytes);
    for (int n = 0; n < i.count; ++n) {
      if constexpr (sizeof(T) == 16)
        w.at<T>(i.o[n])[l] = v[n];
      else
        put(w, i.o[n], l, widened(v[n]));
    }
  });
}
template <class T>
void store(Warp& w, const Instruction& i) {
  char* p[kLanes];
  const size_t bytes = sizeof(T) * size_t(i.count);
  locate(w, i, i.o[0], bytes, {.writes = true, .strong = i.strong}, p);
  each(w.mask, [&](int l) {
    T v[kMostBytes / sizeof(T)];
    for (int n = 0; n < i.count; ++n) {
      if constexpr (sizeof(T) == 16)
        v[n] = w.at<T>(i.o[1 + n])[l];
      else
        v[n] = T(w.lane_value(i.o[1 + n], l));
    }
    memcpy(p[l], v, bytes);
  });
}

// Registers of four bytes, all lanes: what most accesses are.
template <int kCount>
void load_words(Warp& w, const Instruction& i) {
  if (w.mask != ~0u) return load<u32>(w, i);
  char* p[kLanes];
  locate(w, i, i.o[kCount], 4 * kCount, {.reads = true, .strong = i.strong, .nc = i.nc}, p);
  u32* d[kCount];
  for (int n = 0; n < kCount; ++n) d[n] = w.at<u32>(i.o[n]);
  for (int l = 0; l < kLanes; ++l) {
    u32 v[kCount];
    memcpy(v, p[l], sizeof v);
    for (int n = 0; n < kCount; ++n) d[n][l] = v[n];
  }
}
template <int kCount>
void store_words(Warp& w, const Instruction& i) {
  if (w.mask != ~0u) return store<u32>(w, i);
  char* p[kLanes];
  locate(w, i, i.o[0], 4 * kCount, {.writes = true, .strong = i.strong}, p);
  const u32* s[kCount];
  for (int n = 0; n < kCount; ++n) s[n] = w.at<u32>(i.o[1 + n]);
  for (int l = 0; l < kLanes; ++l) {
    u32 v[kCount];
    for (int n = 0; n < kCount; ++n) v[n] = s[n][l];
    memcpy(p[l], v, sizeof v);
  }
}

// The integer that holds a value of a type.
template <class T>
using Word = std::conditional_t<std::is_same_v<T, float>, u32,
                                std::conditional_t<std::is_same_v<T, double>, u64, T>>;

Handler access_of(std::string_view t, const Instruction& i, bool is_load) {
  const int first = is_load ? 0 : 1;
  bool words = t == "b32" || t == "u32" || t == "s32" || t == "f32";
  for (int n = 0; n < i.count; ++n) words &= i.o[size_t(first + n)].size == 4;
  if (words && i.count == 1) return is_load ? &load_words<1> : &store_words<1>;
  if (words && i.count == 2) return is_load ? &load_words<2> : &store_words<2>;
  if (words && i.count == 4) return is_load ? &load_words<4> : &store_words<4>;
  if (t == "b128") return is_load ? &load<u128> : &store<u128>;
  return of<u8, s8, PTX_INTEGERS, PTX_FLOATS>(
      t, [is_load]<class T>() -> Handler { return is_load ? &load<Word<T>> : &store<Word<T>>; });
}

// --- addresses

PTX_UNARY(Move, a);

template <bool kToShared>
void cvta_shared(Warp& w, const Instruction& i) {
  const u64 base = reinterpret_cast<u64>(w.block->shared_base);
  each(w.mask, [&](int l) {
    const u64 v = w.lane_value(i.o[1], l);
    put(w, i.o[0], l, kToShared ? v - base : v + base);
  });
}
template <bool kToLocal>
void cvta_local(Warp& w, const Instruction& i) {
  each(w.mask, [&](int l) {
    const u64 base = reinterpret_cast<u64>(w.local.data() + size_t(l) * w.kernel->local);
    const u64 v = w.lane_value(i.o[1], l);
    put(w, i.o[0], l, kToLocal ? v - base : v + base);
  });
}

bool in_local(const Warp& w, const char* p) {
  const auto* first = reinterpret_cast<const char*>(w.local.data());
  return p >= first && p < first + w.local.size();
}
void isspacep(Warp& w, const Instruction& i) {
  Mask r = 0;
  each(w.mask, [&](int l) {
    const auto* p = reinterpret_cast<const char*>(w.lane_value(i.o[1], l));
    const bool shared = w.is_shared(p), local = in_local(w, p);
    r |= Mask(i.space == Space::shared  ? shared
              : i.space == Space::local ? local
                                        : !shared && !local)
         << l;
  });
  w.set_predicate(i.o[0], r);
}

void nothing(Warp&, const Instruction&) {}
void zero(Warp& w, const Instruction& i) {
  each(w.mask, [&](int l) { put(w, i.o[0], l, 0); });
}

}  // namespace

// The space that an opcode names. The parser has put `.param` of functions into local memory.
static Space space_of(const Opcode& op, const Instruction& i) {
  if (op.one_of({"shared", "shared::cta"}) != "") return Space::shared;
  if (op.has("local")) return Space::local;
  if (op.one_of({"param", "param::entry", "param::func"}) != "")
    return i.space == Space::local ? Space::local : Space::param;
  return op.one_of({"global", "const"}) != "" ? Space::global : Space::generic;
}

static void allow_hints(const Opcode& op) {
  op.allow({"ca", "cg", "cs", "lu", "cv", "wb", "wt", "cta", "cluster", "gpu", "sys", "weak"});
  op.allow({"L1::evict_normal", "L1::evict_unchanged", "L1::evict_first", "L1::evict_last",
            "L1::no_allocate", "L2::evict_first", "L2::evict_last", "L2::evict_normal",
            "L2::cache_hint", "L2::64B", "L2::128B", "L2::256B"});
}

Handler memory(const Opcode& op, Instruction& i) {
  const bool is_load = op.name() != "st";
  i.space = space_of(op, i);
  i.nc = op.has("nc");
  i.strong = op.one_of({"volatile", "relaxed", "acquire", "release", "mmio"}) != "";
  allow_hints(op);
  const std::string_view vector = op.one_of({"v2", "v4", "v8"});
  i.count = vector.empty() ? 1 : vector[1] - '0';
  i.outputs = is_load ? uint8_t(i.count) : 0;
  const Handler h = access_of(op.type(), i, is_load);
  const auto bytes = size_t(i.count) * (op.type() == "b128" ? 16 : 1);
  return bytes > kMostBytes ? nullptr : h;
}

Handler address(const Opcode& op, Instruction& i) {
  const std::string& name = op.name();
  if (name == "cvta") {
    const bool to = op.has("to");
    op.allow({"u32", "u64"});
    const Space space = space_of(op, i);
    if (space == Space::shared) return to ? &cvta_shared<true> : &cvta_shared<false>;
    if (space == Space::local) return to ? &cvta_local<true> : &cvta_local<false>;
    return i.o[0].size == 8 && i.o[1].size == 8 ? &unary<Move, u64, u64> : nullptr;
  }
  if (name == "isspacep") {
    i.space = space_of(op, i);
    return i.space == Space::generic ? nullptr : &isspacep;
  }
  if (name == "createpolicy") {  // its result only hints at what a cache keeps
    op.allow({"fractional", "range", "L2::evict_first", "L2::evict_last", "L2::evict_normal",
              "L2::evict_unchanged", "b64", "global", "cvt", "L2"});
    return &zero;
  }
  i.outputs = 0;
  allow_hints(op);
  op.allow({"global", "local", "L1", "L2"});
  return &nothing;
}

}  // namespace ptx
