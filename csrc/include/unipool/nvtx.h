// SPDX-License-Identifier: Apache-2.0
// UNIPOOL_NVTX_RANGE("literal") marks the rest of the scope as a range of the domain "unipool".
// About 1 ns when no tool is attached; nothing at all without UNIPOOL_NVTX or the nvtx3 headers.
#pragma once

#if defined(UNIPOOL_NVTX) && __has_include(<nvtx3/nvtx3.hpp>)
#include <nvtx3/nvtx3.hpp>

namespace unipool {
struct NvtxDomain {
  static constexpr char const* name{"unipool"};
};
}  // namespace unipool

#define UNIPOOL_NVTX_RANGE(literal) \
  ::nvtx3::scoped_range_in<::unipool::NvtxDomain> unipool_nvtx_range { literal }
#else
#define UNIPOOL_NVTX_RANGE(literal) static_cast<void>(0)
#endif
