// SPDX-License-Identifier: Apache-2.0
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

#include "cpu/simd/bf16_products.h"
#include "cpu/simd/loops.h"

#ifdef UNIPOOL_X86
#include <cpuid.h>
#endif

namespace unipool::cpu {

#define UNIPOOL_DECLARE_LOOPS(isa)                      \
  namespace isa {                                       \
  template <class T>                                    \
  const Loops<T>& table();                              \
  extern template const Loops<float>& table<float>();   \
  extern template const Loops<double>& table<double>(); \
  extern template const Loops<bf16>& table<bf16>();     \
  }

UNIPOOL_DECLARE_LOOPS(baseline)
#ifdef UNIPOOL_X86
UNIPOOL_DECLARE_LOOPS(avx2)
UNIPOOL_DECLARE_LOOPS(avx512)
UNIPOOL_DECLARE_LOOPS(avx512_bf16)
namespace avx512_bf16 {
const Bf16Products& products();
}
#endif

namespace {

enum Isa { kBaseline, kAvx2, kAvx512, kAvx512Bf16, kAmx };

Isa detect() {
#ifdef UNIPOOL_X86
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (!avx512) return avx2 ? kAvx2 : kBaseline;
  if (!__builtin_cpu_supports("avx512bf16")) return kAvx512;
  constexpr unsigned kAmxBf16 = 1u << 22;  // CPUID leaf 7, EDX; older compilers have no name for it
  unsigned eax, ebx, ecx, edx = 0;
  __get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx);
  return edx & kAmxBf16 ? kAmx : kAvx512Bf16;
#else
  return kBaseline;
#endif
}

// The best instruction set of this processor, or UNIPOOL_CPU_ISA if that is less.
Isa isa() {
  static const Isa chosen = [] {
    constexpr const char* kNames[] = {"baseline", "avx2", "avx512", "avx512_bf16", "amx"};
    const Isa best = detect();
    const char* limit = std::getenv("UNIPOOL_CPU_ISA");
    if (limit == nullptr) return best;
    for (int i = kBaseline; i <= kAmx; ++i) {
      if (std::strcmp(limit, kNames[i]) == 0) return i < best ? Isa(i) : best;
    }
    throw std::invalid_argument(
        std::string("UNIPOOL_CPU_ISA must be baseline, avx2, avx512, avx512_bf16 or amx, got ") +
        limit);
  }();
  return chosen;
}

}  // namespace

template <class T>
const Loops<T>& loops() {
#ifdef UNIPOOL_X86
  if (isa() >= kAvx512Bf16) return avx512_bf16::table<T>();
  if (isa() >= kAvx512) return avx512::table<T>();
  if (isa() >= kAvx2) return avx2::table<T>();
#endif
  return baseline::table<T>();
}

template const Loops<float>& loops<float>();
template const Loops<double>& loops<double>();
template const Loops<bf16>& loops<bf16>();

const Bf16Products* bf16_products() {
#ifdef UNIPOOL_X86
  if (isa() == kAvx512Bf16) return &avx512_bf16::products();
#endif
  return nullptr;
}

}  // namespace unipool::cpu
