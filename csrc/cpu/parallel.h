// SPDX-License-Identifier: Apache-2.0
// Tasks over ATen's thread pool.
#pragma once

#include <ATen/Parallel.h>

#include <algorithm>
#include <atomic>
#include <cstdint>

namespace unipool::cpu {

// Runs task(i) for i in [0, tasks), each thread taking the next one when it is free: tasks may
// differ in length. make_worker() is called once per thread and returns the callable, so that
// scratch memory can live in it. A task writes only its own outputs, so results do not depend on
// who runs it. flops: of all tasks; a thread more is worth waking for kFlopsPerThread of them.
template <class MakeWorker>
void parallel_tasks(int64_t tasks, double flops, MakeWorker make_worker) {
  constexpr double kFlopsPerThread = 1e6;
  if (tasks == 0) return;
  std::atomic<int64_t> next{0};
  const int64_t worthwhile = 1 + static_cast<int64_t>(std::min(flops / kFlopsPerThread, 1e6));
  const int64_t threads =
      std::min({static_cast<int64_t>(at::get_num_threads()), tasks, worthwhile});
  at::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
    auto worker = make_worker();
    if (begin == end) return;
    for (int64_t i = next.fetch_add(1); i < tasks; i = next.fetch_add(1)) worker(i);
  });
}

}  // namespace unipool::cpu
