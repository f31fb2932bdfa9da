// SPDX-License-Identifier: Apache-2.0
#pragma once
#define cast_smem_ptr_to_uint cast_smem_ptr_to_uint_hw
#include_next <cute/arch/util.hpp>
#undef cast_smem_ptr_to_uint
namespace cute {
inline uint32_t cast_smem_ptr_to_uint(void const* p) { return emu::shared_offset(p); }
}  // namespace cute
