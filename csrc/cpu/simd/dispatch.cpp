// SPDX-License-Identifier: Apache-2.0
#include "cpu/simd/loops.h"

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
#endif

template <class T>
const Loops<T>& loops() {
#ifdef UNIPOOL_X86
  static const bool has_avx512 =
      __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  static const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  if (has_avx512) return avx512::table<T>();
  if (has_avx2) return avx2::table<T>();
#endif
  return baseline::table<T>();
}

template const Loops<float>& loops<float>();
template const Loops<double>& loops<double>();
template const Loops<bf16>& loops<bf16>();

}  // namespace unipool::cpu
