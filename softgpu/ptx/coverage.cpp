// SPDX-License-Identifier: Apache-2.0
// Which instructions of the kernels were executed, for softgpu/python/softgpu/coverage.py.
#include <fcntl.h>
#include <sys/file.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <mutex>

#include "ptx/ptx.h"

namespace ptx {
namespace {

std::string quoted(const std::string& s) {
  std::string r = "\"";
  for (const char c : s) {
    if (c == '"' || c == '\\') r += '\\';
    r += static_cast<unsigned char>(c) < ' ' ? ' ' : c;
  }
  return r + '"';
}

// Kernels stay alive until the process ends, whatever becomes of their modules.
std::vector<std::shared_ptr<const Kernel>>& kept() {
  static auto* all = new std::vector<std::shared_ptr<const Kernel>>;
  return *all;
}
std::mutex mutex;

// One write under a lock: lines of processes that end together do not mix.
void write_coverage() {
  std::string text;
  for (const auto& kernel : kept()) text += coverage_line(*kernel);
  const char* path = getenv("SOFTGPU_COVERAGE");
  const int file = open(path, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0666);
  if (file < 0 || flock(file, LOCK_EX) || write(file, text.data(), text.size()) < 0)
    perror("softgpu: SOFTGPU_COVERAGE");
  if (file >= 0) close(file);
}

}  // namespace

std::string coverage_line(const Kernel& k) {
  const size_t total = k.texts.size();
  std::string s = "{\"kernel\": " + quoted(k.name) +
                  ", \"architecture\": " + quoted(k.architecture) +
                  ", \"launches\": " + std::to_string(k.work.launches) +
                  ", \"total\": " + std::to_string(total) + ", \"missed\": [";
  const char* comma = "";
  for (size_t n = 0; n < total; ++n) {
    const Instruction& i = k.code[n];
    if (i.ran) continue;
    s += comma + ("[" + std::to_string(n)) + ", " + std::to_string(i.line) + ", " +
         (i.source < 0 ? "null" : quoted(k.sources[i.source])) + ", " + quoted(k.texts[n]) + "]";
    comma = ", ";
  }
  return s + "]}\n";
}

void keep_for_coverage(const std::shared_ptr<const Kernel>& kernel) {
  static const bool on = [] {
    const char* path = getenv("SOFTGPU_COVERAGE");
    return path && *path && !atexit(write_coverage);
  }();
  if (!on) return;
  const std::lock_guard lock(mutex);
  kept().push_back(kernel);
}

}  // namespace ptx
