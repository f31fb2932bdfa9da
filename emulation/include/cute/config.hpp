// SPDX-License-Identifier: Apache-2.0
// Found before CuTe's own: an atom with no emulation must stop the kernel, not print and go on.
#pragma once
#include_next <cute/config.hpp>

#include "emu.h"
#undef CUTE_INVALID_CONTROL_PATH
#define CUTE_INVALID_CONTROL_PATH(x) \
  ::emu::fatal(std::string("not emulated: ") + x, ::emu::Site{__FILE__, __LINE__})
