// SPDX-License-Identifier: Apache-2.0
#pragma once
#include "emu_sm90.h"
#define warpgroup_arrive warpgroup_arrive_hw
#define warpgroup_wait warpgroup_wait_hw
#define warpgroup_commit_batch warpgroup_commit_batch_hw
#define MMA_64x64x16_F32BF16BF16_SS MMA_64x64x16_F32BF16BF16_SS_hw
#define MMA_64x128x16_F32BF16BF16_SS MMA_64x128x16_F32BF16BF16_SS_hw
#define MMA_64x256x16_F32BF16BF16_SS MMA_64x256x16_F32BF16BF16_SS_hw
#include_next <cute/arch/mma_sm90_gmma.hpp>
#undef warpgroup_arrive
#undef warpgroup_wait
#undef warpgroup_commit_batch
#undef MMA_64x64x16_F32BF16BF16_SS
#undef MMA_64x128x16_F32BF16BF16_SS
#undef MMA_64x256x16_F32BF16BF16_SS
namespace cute {
inline void warpgroup_arrive() { emu::wgmma_fence({__FILE__, __LINE__}); }
inline void warpgroup_commit_batch() { emu::wgmma_commit({__FILE__, __LINE__}); }
template <int N>
void warpgroup_wait() {
  emu::wgmma_wait(N, {__FILE__, __LINE__});
}
namespace SM90::GMMA {
// fma is an object, not a function: CuTe hands it on by name and calls it with N / 2 accumulators.
template <int N, Major tnspA, Major tnspB, ScaleIn scaleA, ScaleIn scaleB>
struct EmuFma {
  template <class... X>
  void operator()(uint64_t const& a, uint64_t const& b, X&&... x) const {
    emu::WgmmaArg w{a, b, N, false, int(scaleA), int(scaleB), int(tnspA), int(tnspB), {}};
    int i = 0;
    (take(w, i, x), ...);
    emu::wgmma(w, {__FILE__, __LINE__});
  }
  static void take(emu::WgmmaArg& w, int& i, float& d) { w.d[i++] = &d; }
  static void take(emu::WgmmaArg& w, int&, ScaleOut const& s) { w.zero = s == ScaleOut::Zero; }
};
#define EMU_GMMA(N)                                                                   \
  template <Major tA, Major tB, ScaleIn sA = ScaleIn::One, ScaleIn sB = ScaleIn::One> \
  struct MMA_64x##N##x16_F32BF16BF16_SS {                                             \
    using DRegisters = void;                                                          \
    using ARegisters = uint64_t[1];                                                   \
    using BRegisters = uint64_t[1];                                                   \
    using CRegisters = float[N / 2];                                                  \
    static constexpr EmuFma<N, tA, tB, sA, sB> fma{};                                 \
  };
EMU_GMMA(64)
EMU_GMMA(128)
EMU_GMMA(256)
}  // namespace SM90::GMMA
}  // namespace cute
