// SPDX-License-Identifier: Apache-2.0
// Which work comes before which. Work runs when it is submitted, so what streams leave unordered
// cannot show as a wrong result; it is found by vector clocks: work of a stream, events, waits and
// the host's synchronisation order work, and two accesses to the same bytes, one of them a write,
// that nothing orders are reported. The interpreter tells of each access, so that nothing is
// guessed.
#pragma once
#include <cstddef>
#include <cstdint>
#include <map>
#include <string>

#include "runtime/memory.h"

namespace softgpu {

// Per line (a stream, or one of a graph's), how much of its work comes before.
using Clock = std::map<int, uint64_t>;
void join(Clock& clock, const Clock& other);
int new_line();

// Work that runs now, on this thread: its accesses are checked when it ends. The clock must outlive
// it; the name is for reports.
class Running {
 public:
  Running(int line, const Clock& clock, const std::string& name);
  ~Running();
  Running(const Running&) = delete;
  Running& operator=(const Running&) = delete;
};

bool runs_work();

// What the host has waited for comes before all that it submits from then on. One clock for all of
// its threads: how they wait for each other is not known here.
void host_waits_for(const Clock& clock);
const Clock& host_clock();

// The work that runs reads or writes bytes of device memory. Nothing while nobody checks.
void touch(const void* p, size_t bytes, bool writes);
bool checks_streams();

// An allocation is freed.
void forget(const Allocation& a);

}  // namespace softgpu
