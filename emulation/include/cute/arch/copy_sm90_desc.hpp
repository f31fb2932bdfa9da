// SPDX-License-Identifier: Apache-2.0
#pragma once
#include "emu_sm90.h"
#define initialize_barrier initialize_barrier_hw
#define set_barrier_transaction_bytes set_barrier_transaction_bytes_hw
#define wait_barrier wait_barrier_hw
#define arrive_barrier arrive_barrier_hw
#define prefetch_tma_descriptor prefetch_tma_descriptor_hw
#include_next <cute/arch/copy_sm90_desc.hpp>
#undef initialize_barrier
#undef set_barrier_transaction_bytes
#undef wait_barrier
#undef arrive_barrier
#undef prefetch_tma_descriptor
namespace cute {
inline void initialize_barrier(uint64_t& b, int n = 1, EMU_SITE) {
  emu::mbar_init(&b, n, emu_site);
}
inline void set_barrier_transaction_bytes(uint64_t& b, uint32_t bytes, EMU_SITE) {
  emu::mbar_arrive(&b, bytes, emu_site);
}
inline void wait_barrier(uint64_t& b, int phase, EMU_SITE) {
  emu::mbar_wait(&b, uint32_t(phase), emu_site);
}
inline void arrive_barrier(uint64_t& b, EMU_SITE) { emu::mbar_arrive(&b, 0, emu_site); }
inline void prefetch_tma_descriptor(TmaDescriptor const*) {}
}  // namespace cute
