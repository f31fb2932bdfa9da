// SPDX-License-Identifier: Apache-2.0
// What Python calls: functions of C. Texts that they return are valid until the next call of the
// thread; one that starts with "error: " says why there is nothing else.
#include <cstring>

#include "ptx/opcode.h"
#include "ptx/ptx.h"

namespace {

thread_local std::string answer;

template <class F>
const char* answered(F f) {
  answer.clear();
  try {
    f();
  } catch (const std::exception& e) {
    answer = std::string("error: ") + e.what();
  }
  return answer.c_str();
}

}  // namespace

// A coverage line for every kernel of a PTX text, none of them executed.
extern "C" const char* softgpu_ptx_inventory(const char* text) {
  return answered([&] {
    ptx::Module module(text);
    for (const std::string& name : module.names()) answer += coverage_line(module.kernel(name));
  });
}

// The names of the opcodes that are known, with spaces between.
extern "C" const char* softgpu_ptx_opcodes() {
  return answered([&] {
    for (const ptx::Entry& e : ptx::table()) answer += std::string(e.name) + " ";
  });
}

// Runs a kernel of a PTX text. The values of the arguments stand one after another in `arguments`,
// `sizes` has the bytes of each. The answer is the profile's line, then that of the coverage.
extern "C" const char* softgpu_run_ptx(const char* text, const char* kernel, const unsigned* grid,
                                       const unsigned* block, const char* arguments,
                                       const size_t* sizes, size_t count, size_t shared,
                                       const char* settings) {
  return answered([&] {
    ptx::Module module(text);
    const auto params = module.params(kernel);
    if (params.size() != count)
      throw ptx::Error(std::string(kernel) + ": " + std::to_string(params.size()) +
                       " parameters, not " + std::to_string(count));
    std::vector<char> bytes;
    for (size_t n = 0; n < count; arguments += sizes[n++]) {
      const auto& [offset, size] = params[n];
      if (sizes[n] != size)
        throw ptx::Error(std::string(kernel) + ": parameter " + std::to_string(n) + " has " +
                         std::to_string(size) + " bytes, not " + std::to_string(sizes[n]));
      bytes.resize(offset + size);
      memcpy(bytes.data() + offset, arguments, size);
    }
    ptx::Kernel& k = module.kernel(kernel);
    ptx::Options options = ptx::Options::parse(settings);
    options.only = ptx::Options::current().only;
    launch(k, {grid[0], grid[1], grid[2]}, {block[0], block[1], block[2]}, shared, bytes, options);
    answer = profile_line(k) + coverage_line(k);
  });
}

// Sets Options::current(), but for `only` and what the environment says of the profile. The answer
// is empty.
extern "C" const char* softgpu_options(const char* settings) {
  return answered([&] {
    const ptx::Options& fixed = ptx::Options::of_environment();
    ptx::Options options = ptx::Options::parse(settings);
    options.only = ptx::Options::current().only;
    options.profile = fixed.profile;
    options.sms = fixed.sms;
    ptx::Options::current() = options;
  });
}

// Sets Options::only of what is current.
extern "C" void softgpu_only(const void* const* starts, const size_t* sizes, size_t count) {
  auto& only = ptx::Options::current().only;
  only.clear();
  for (size_t n = 0; n < count; ++n)
    only.push_back({static_cast<const char*>(starts[n]), sizes[n]});
}

// set_override() with a PTX text, or null. The answer is empty.
extern "C" const char* softgpu_override(const char* text) {
  return answered([&] { ptx::set_override(text ? std::make_unique<ptx::Module>(text) : nullptr); });
}

extern "C" const char* softgpu_last_error() { return ptx::last_error.c_str(); }
