// SPDX-License-Identifier: Apache-2.0
#include "runtime/order.h"

#include <algorithm>
#include <cstdio>
#include <set>
#include <vector>

#include "runtime/core.h"
#include "runtime/settings.h"

namespace softgpu {
namespace {

struct Bytes {
  const char *begin, *end;
};

// Bytes of one allocation that one piece of work read, or wrote.
struct Access {
  const std::string* name;  // of the work
  int line;
  uint64_t count;  // of the line's work
  bool writes;
  std::vector<Bytes> bytes;  // sorted, apart
};

bool checking = settings().stream_check;
std::map<const char*, std::vector<Access>> history;  // by the begin of the allocation
std::set<std::string> names;                         // of work; Access points into it
std::set<std::string> reports;
std::string report_text;
Clock host;

void merge(std::vector<Bytes>& bytes) {
  std::sort(bytes.begin(), bytes.end(), [](auto& a, auto& b) { return a.begin < b.begin; });
  size_t last = 0;
  for (size_t i = 1; i < bytes.size(); ++i) {
    if (bytes[i].begin <= bytes[last].end) {
      bytes[last].end = std::max(bytes[last].end, bytes[i].end);
    } else {
      bytes[++last] = bytes[i];
    }
  }
  bytes.resize(std::min(bytes.size(), last + 1));
}

// The first byte that is in both, or null.
const char* common(const std::vector<Bytes>& a, const std::vector<Bytes>& b) {
  for (size_t i = 0, j = 0; i < a.size() && j < b.size();) {
    const char* from = std::max(a[i].begin, b[j].begin);
    if (from < std::min(a[i].end, b[j].end)) return from;
    a[i].end < b[j].end ? ++i : ++j;
  }
  return nullptr;
}

bool covers(const std::vector<Bytes>& all, const std::vector<Bytes>& part) {
  return std::all_of(part.begin(), part.end(), [&](const Bytes& p) {
    const auto after = std::upper_bound(all.begin(), all.end(), p.begin,
                                        [](const char* c, const Bytes& b) { return c < b.begin; });
    return after != all.begin() && std::prev(after)->end >= p.end;
  });
}

bool before(const Access& a, const Clock& clock) {
  const auto found = clock.find(a.line);
  return found != clock.end() && found->second >= a.count;
}

void report(const Access& a, const Access& b, const char* at, const Allocation& in) {
  std::string line = *b.name + (b.writes ? " writes" : " reads") + " what " + *a.name +
                     (a.writes ? " wrote" : " read") + ", and nothing orders them";
  if (!reports.insert(line).second) return;
  line += ": byte " + std::to_string(at - in.begin) + " of an allocation of " +
          std::to_string(in.bytes) + " on device " + std::to_string(in.device);
  fprintf(stderr, "softgpu: race of streams: %s\n", line.c_str());
  report_text += line + '\n';
}

// The accesses of the work that runs, per allocation.
struct Collected {
  const Allocation* in;
  std::vector<Bytes> bytes[2];  // read, written
};
constexpr size_t kMergeAt = 1 << 14;

struct Current {
  int line;
  const Clock* clock;
  const std::string* name;
  std::vector<Collected> collected;
  size_t last = 0;  // where the last access was
};
thread_local std::vector<Current> current;

void check(const Allocation& in, Access access, const Clock& clock) {
  auto& old = history[in.begin];
  for (const Access& other : old) {
    if (!(other.writes || access.writes) || before(other, clock)) continue;
    if (const char* at = common(other.bytes, access.bytes)) report(other, access, at, in);
  }
  // What comes before everything to come, and what this access stands for from now on.
  std::erase_if(old, [&](const Access& other) {
    return before(other, host) || (before(other, clock) && covers(access.bytes, other.bytes) &&
                                   (access.writes || (!other.writes && other.line == access.line)));
  });
  old.push_back(std::move(access));
}

}  // namespace

void join(Clock& clock, const Clock& other) {
  for (const auto& [line, count] : other) clock[line] = std::max(clock[line], count);
}

int new_line() {
  static int last = kMaxDevices - 1;  // the first are the default streams
  return ++last;
}

Running::Running(int line, const Clock& clock, const std::string& name) {
  current.push_back({line, &clock, checking ? &*names.insert(name).first : nullptr, {}});
}

Running::~Running() {
  Current work = std::move(current.back());
  current.pop_back();
  if (!checking || !work.name) return;
  const uint64_t count = work.clock->at(work.line);
  for (Collected& c : work.collected) {
    for (int writes = 1; writes >= 0; --writes) {
      if (c.bytes[writes].empty()) continue;
      merge(c.bytes[writes]);
      check(*c.in, {work.name, work.line, count, bool(writes), std::move(c.bytes[writes])},
            *work.clock);
    }
  }
}

bool runs_work() { return !current.empty(); }

void host_waits_for(const Clock& clock) { join(host, clock); }
const Clock& host_clock() { return host; }

bool checks_streams() { return checking; }

void touch(const void* p, size_t bytes, bool writes) {
  if (!checking || current.empty() || !bytes || !current.back().name) return;
  Current& work = current.back();
  const auto c = static_cast<const char*>(p);
  auto& all = work.collected;
  const auto holds = [&](const Collected& x) { return c >= x.in->begin && c < x.in->end(); };
  if (work.last >= all.size() || !holds(all[work.last])) {
    const auto found = std::find_if(all.begin(), all.end(), holds);
    work.last = size_t(found - all.begin());
    if (found == all.end()) {
      const Allocation* in = allocation_at(p);
      if (!in) return;  // shared memory, or the host's
      all.push_back({in, {}});
    }
  }
  std::vector<Bytes>& list = all[work.last].bytes[writes];
  if (!list.empty() && c >= list.back().begin && c <= list.back().end) {
    list.back().end = std::max(list.back().end, c + bytes);
    return;
  }
  list.push_back({c, c + bytes});
  if (list.size() % kMergeAt == 0) merge(list);
}

void forget(const Allocation& a) { history.erase(a.begin); }

}  // namespace softgpu

using namespace softgpu;

// ---- for Python: the check switched on or off, and what it found since (until the next call)

extern "C" void softgpu_check_streams(int on) {
  Lock lock(mutex);
  checking = on;
  history.clear();
  reports.clear();
  report_text.clear();
}
extern "C" const char* softgpu_races() {
  static thread_local std::string copy;
  Lock lock(mutex);
  copy = report_text;
  return copy.c_str();
}
