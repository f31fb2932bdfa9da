// SPDX-License-Identifier: Apache-2.0
// CuTe's own atoms under their names, but for those emulated here (the hardware one is renamed
// away).
#pragma once
#define SM80_16x8x16_F32BF16BF16F32_TN SM80_16x8x16_F32BF16BF16F32_TN_hw
#define SM80_16x8x16_F32F16F16F32_TN SM80_16x8x16_F32F16F16F32_TN_hw
#include_next <cute/arch/mma_sm80.hpp>
#undef SM80_16x8x16_F32BF16BF16F32_TN
#undef SM80_16x8x16_F32F16F16F32_TN
namespace cute {
template <void (*kMma)(emu::MmaArg&, emu::Site)>
struct EmuMma16x8x16 {
  using DRegisters = float[4];
  using ARegisters = uint32_t[4];
  using BRegisters = uint32_t[2];
  using CRegisters = float[4];
  static void fma(float& d0, float& d1, float& d2, float& d3, uint32_t const& a0,
                  uint32_t const& a1, uint32_t const& a2, uint32_t const& a3, uint32_t const& b0,
                  uint32_t const& b1, float const& c0, float const& c1, float const& c2,
                  float const& c3) {
    emu::MmaArg m{{a0, a1, a2, a3}, {b0, b1}, {c0, c1, c2, c3}};
    kMma(m, {__FILE__, __LINE__});
    d0 = m.c[0];
    d1 = m.c[1];
    d2 = m.c[2];
    d3 = m.c[3];
  }
};
struct SM80_16x8x16_F32BF16BF16F32_TN : EmuMma16x8x16<emu::mma_bf16> {};
struct SM80_16x8x16_F32F16F16F32_TN : EmuMma16x8x16<emu::mma_f16> {};
}  // namespace cute
