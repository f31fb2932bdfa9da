// SPDX-License-Identifier: Apache-2.0
#pragma once
#include "emu_sm90.h"
#define SM90_TMA_LOAD SM90_TMA_LOAD_hw
#include_next <cute/arch/copy_sm90_tma.hpp>
#undef SM90_TMA_LOAD
namespace cute {
struct SM90_TMA_LOAD {
  template <class... C>
  static void copy(void const* map, uint64_t* bar, uint64_t, void* dst, C const&... c) {
    int32_t crd[] = {c...};
    emu::tma_load(map, bar, dst, crd, sizeof...(C), {__FILE__, __LINE__});
  }
  struct PREFETCH {
    template <class... C>
    static void copy(void const*, C const&...) {}
  };
};
}  // namespace cute
