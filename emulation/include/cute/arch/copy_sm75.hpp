// SPDX-License-Identifier: Apache-2.0
#pragma once
#define SM75_U32x1_LDSM_N SM75_U32x1_LDSM_N_hw
#define SM75_U32x2_LDSM_N SM75_U32x2_LDSM_N_hw
#define SM75_U32x4_LDSM_N SM75_U32x4_LDSM_N_hw
#define SM75_U16x2_LDSM_T SM75_U16x2_LDSM_T_hw
#define SM75_U16x4_LDSM_T SM75_U16x4_LDSM_T_hw
#define SM75_U16x8_LDSM_T SM75_U16x8_LDSM_T_hw
#include_next <cute/arch/copy_sm75.hpp>
#undef SM75_U32x1_LDSM_N
#undef SM75_U32x2_LDSM_N
#undef SM75_U32x4_LDSM_N
#undef SM75_U16x2_LDSM_T
#undef SM75_U16x4_LDSM_T
#undef SM75_U16x8_LDSM_T
namespace cute {
template <int N, bool Trans>
struct EmuLdsm {
  using SRegisters = uint128_t[1];
  using DRegisters = uint32_t[N];
  template <class... D>
  static void copy(uint128_t const& row, D&... dst) {
    static_assert(sizeof...(D) == N);
    emu::LdsmArg a{&row, N, {}};
    emu::ldmatrix(a, Trans, {__FILE__, __LINE__});
    int i = 0;
    ((dst = a.r[i++]), ...);
  }
};
struct SM75_U32x1_LDSM_N : EmuLdsm<1, false> {};
struct SM75_U32x2_LDSM_N : EmuLdsm<2, false> {};
struct SM75_U32x4_LDSM_N : EmuLdsm<4, false> {};
struct SM75_U16x2_LDSM_T : EmuLdsm<1, true> {};
struct SM75_U16x4_LDSM_T : EmuLdsm<2, true> {};
struct SM75_U16x8_LDSM_T : EmuLdsm<4, true> {};
}  // namespace cute
