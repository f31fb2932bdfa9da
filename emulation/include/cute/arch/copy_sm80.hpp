// SPDX-License-Identifier: Apache-2.0
#pragma once
#define SM80_CP_ASYNC_CACHEALWAYS SM80_CP_ASYNC_CACHEALWAYS_hw
#define SM80_CP_ASYNC_CACHEGLOBAL SM80_CP_ASYNC_CACHEGLOBAL_hw
#define SM80_CP_ASYNC_CACHEALWAYS_ZFILL SM80_CP_ASYNC_CACHEALWAYS_ZFILL_hw
#define SM80_CP_ASYNC_CACHEGLOBAL_ZFILL SM80_CP_ASYNC_CACHEGLOBAL_ZFILL_hw
#define cp_async_fence cp_async_fence_hw
#define cp_async_wait cp_async_wait_hw
#include_next <cute/arch/copy_sm80.hpp>
#undef SM80_CP_ASYNC_CACHEALWAYS
#undef SM80_CP_ASYNC_CACHEGLOBAL
#undef SM80_CP_ASYNC_CACHEALWAYS_ZFILL
#undef SM80_CP_ASYNC_CACHEGLOBAL_ZFILL
#undef cp_async_fence
#undef cp_async_wait
namespace cute {
template <class TS, class TD>
struct EmuCpAsync {
  using SRegisters = TS[1];
  using DRegisters = TD[1];
  static void copy(TS const& src, TD& dst, bool pred = true) {
    emu::cp_async(&dst, &src, sizeof(TS), pred ? sizeof(TS) : 0, {__FILE__, __LINE__});
  }
};
template <class TS, class TD = TS>
struct SM80_CP_ASYNC_CACHEALWAYS : EmuCpAsync<TS, TD> {};
template <class TS, class TD = TS>
struct SM80_CP_ASYNC_CACHEGLOBAL : EmuCpAsync<TS, TD> {};
template <class TS, class TD = TS>
struct SM80_CP_ASYNC_CACHEALWAYS_ZFILL : EmuCpAsync<TS, TD> {};
template <class TS, class TD = TS>
struct SM80_CP_ASYNC_CACHEGLOBAL_ZFILL : EmuCpAsync<TS, TD> {};
inline void cp_async_fence() { emu::cp_async_commit(); }
template <int N>
void cp_async_wait() {
  emu::cp_async_wait(N, N == 0);
}
template <int N>
void cp_async_wait(Int<N>) {
  cp_async_wait<N>();
}
}  // namespace cute
