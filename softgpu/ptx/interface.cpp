// SPDX-License-Identifier: Apache-2.0
// What Python calls: functions of C.
#include "ptx/ptx.h"

// A coverage line for every kernel of a PTX text, valid until the next call of this thread; or
// "error: " and why not.
extern "C" const char* softgpu_ptx_inventory(const char* text) {
  static thread_local std::string result;
  result.clear();
  try {
    ptx::Module module(text);
    for (const std::string& name : module.names()) result += coverage_line(module.kernel(name));
  } catch (const std::exception& e) {
    result = std::string("error: ") + e.what();
  }
  return result.c_str();
}
