// SPDX-License-Identifier: Apache-2.0
// A launcher with C linkage: the struct goes by pointer; its size lets Python check its own copy.
#pragma once
#include <cstddef>

#define LAUNCHER(op, Args)                                  \
  extern "C" int emulated_##op(const unipool::Args* args) { \
    return unipool::launch_##op(*args, nullptr);            \
  }                                                         \
  extern "C" size_t emulated_##op##_size() { return sizeof(unipool::Args); }
