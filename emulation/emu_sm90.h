// SPDX-License-Identifier: Apache-2.0
// Hopper's asynchronous engines: mbarrier, TMA tile loads, wgmma on shared-memory descriptors.
#pragma once
#include "emu.h"
namespace emu {
void mbar_init(uint64_t* bar, int count, Site site);
void mbar_arrive(uint64_t* bar, uint32_t expect_bytes, Site site);
bool mbar_test(uint64_t* bar, uint32_t parity, Site site);
void mbar_wait(uint64_t* bar, uint32_t parity, Site site);
void tma_load(const void* tensor_map, uint64_t* bar, void* dst, const int32_t* coord, int rank,
              Site site);
struct WgmmaArg {
  uint64_t a, b;
  int n;
  bool zero;
  int scale_a, scale_b, major_a, major_b;
  float* d[128];
};
void wgmma(const WgmmaArg& arg,
           Site site);  // wgmma.mma_async m64nNk16 f32.bf16.bf16, both operands from shared memory
void wgmma_fence(Site site);
void wgmma_commit(Site site);
void wgmma_wait(int pending, Site site);
}  // namespace emu
