// SPDX-License-Identifier: Apache-2.0
// Lines of JSON about kernels: which instructions were executed, and what they cost.
#include <fcntl.h>
#include <sys/file.h>
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <mutex>

#include "ptx/warp.h"

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
std::string field(const char* name, uint64_t value) {
  return std::string(", \"") + name + "\": " + std::to_string(value);
}
std::string head(const Kernel& k) {
  return "{\"kernel\": " + quoted(k.name) + ", \"architecture\": " + quoted(k.architecture);
}

// One write under a lock: lines of processes that end together do not mix.
void append(const char* variable, const std::string& text) {
  const char* path = getenv(variable);
  const int file = open(path, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0666);
  if (file < 0 || flock(file, LOCK_EX) || write(file, text.data(), text.size()) < 0)
    fprintf(stderr, "softgpu: %s: cannot write %s\n", variable, path);
  if (file >= 0) close(file);
}

// Kernels stay alive until the process ends, whatever becomes of their modules.
std::vector<std::shared_ptr<const Kernel>>& kept() {
  static auto* all = new std::vector<std::shared_ptr<const Kernel>>;
  return *all;
}
std::mutex mutex;

bool is_set(const char* variable) {
  const char* value = getenv(variable);
  return value && *value;
}

// Once: what the process launches after that is in no report.
void write_reports() {
  const std::lock_guard lock(mutex);
  static bool written = false;
  if (written || kept().empty()) return;
  written = true;
  std::vector<std::string> coverage, profile;
  for (const auto& kernel : kept()) {
    if (!kernel->launches) continue;
    coverage.push_back(coverage_line(*kernel));
    profile.push_back(profile_line(*kernel));
  }
  for (const auto& [variable, lines] :
       {std::pair{"SOFTGPU_COVERAGE", &coverage}, {"SOFTGPU_PROFILE", &profile}}) {
    if (!is_set(variable)) continue;
    std::sort(lines->begin(), lines->end());
    std::string text;
    for (const std::string& line : *lines) text += line;
    append(variable, text);
  }
}

const char* const kClassNames[] = {
    "integer",    "float32",      "float64",      "half",        "tensor",      "special",
    "conversion", "compare",      "move",         "load_global", "load_shared", "load_local",
    "load_param", "store_global", "store_shared", "store_local", "atomic",      "copy_async",
    "exchange",   "barrier",      "branch",       "other"};
static_assert(std::size(kClassNames) == size_t(Class::count));

std::string counts(const char* name, const Counts& c, const char* parts) {
  return std::string(", \"") + name + "\": {\"requests\": " + std::to_string(c.requests) +
         field(parts, c.parts) + field("ideal", c.ideal) + field("bytes", c.bytes) + "}";
}

}  // namespace

std::string coverage_line(const Kernel& k) {
  const size_t total = k.texts.size();
  std::string s =
      head(k) + field("launches", k.launches) + field("total", total) + ", \"missed\": [";
  const char* comma = "";
  for (size_t n = 0; n < total; ++n) {
    const Instruction& i = k.code[n];
    if (i.ran) continue;
    s += comma + ("[" + std::to_string(n)) + ", " + std::to_string(i.line) + ", " +
         (i.source < 0 ? "null" : quoted(k.sources[size_t(i.source)])) + ", " + quoted(k.texts[n]) +
         "]";
    comma = ", ";
  }
  return s + "]}\n";
}

std::string profile_line(const Kernel& k) {
  const Profile& p = k.profile;
  std::string s = head(k) + field("launches", p.launches) + field("blocks", p.blocks) +
                  field("warps", p.warps) + field("issued", p.issued) + field("lanes", p.lanes) +
                  field("tensor_flops", p.flops) + ", \"instructions\": {";
  const char* comma = "";
  for (size_t c = 0; c < p.classes.size(); ++c) {
    if (!p.classes[c]) continue;
    s += comma + quoted(kClassNames[c]) + ": " + std::to_string(p.classes[c]);
    comma = ", ";
  }
  s += "}" + counts("global_load", p.global_load, "sectors") +
       counts("global_store", p.global_store, "sectors") +
       counts("global_atomic", p.global_atomic, "sectors") +
       counts("shared_load", p.shared_load, "wavefronts") +
       counts("shared_store", p.shared_store, "wavefronts") +
       counts("shared_atomic", p.shared_atomic, "wavefronts");
  return s + "}\n";
}

void keep_for_reports(const std::shared_ptr<const Kernel>& kernel) {
  static const bool on =
      (is_set("SOFTGPU_COVERAGE") || is_set("SOFTGPU_PROFILE")) && !atexit(write_reports);
  if (!on) return;
  const std::lock_guard lock(mutex);
  kept().push_back(kernel);
}

}  // namespace ptx

// For a process that may be ended before its exit handlers have run.
extern "C" void softgpu_write_reports() { ptx::write_reports(); }
