// SPDX-License-Identifier: Apache-2.0
// Helpers of the CPU backend: dispatch over dtypes and threads.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <c10/util/BFloat16.h>

#ifdef __linux__
#include <sys/mman.h>
#endif

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <type_traits>

#include "cpu/simd/loops.h"

namespace unipool::cpu {

// Tag of an element type, for generic lambdas: `using T = typename decltype(tag)::type`.
template <class T>
struct Type {
  using type = T;
};

// f(Type<T>) for the T of a dtype that check_<op> has let through.
template <class F>
auto for_dtype(at::ScalarType dtype, F f) {
  switch (dtype) {
    case at::kDouble:
      return f(Type<double>());
    case at::kBFloat16:
      return f(Type<bf16>());
    default:
      return f(Type<float>());
  }
}

template <class T>
using torch_t = std::conditional_t<std::is_same_v<T, bf16>, at::BFloat16, T>;

template <class T>
const T* data(const at::Tensor& t) {
  return reinterpret_cast<const T*>(t.const_data_ptr<torch_t<T>>());
}

template <class T>
T* mutable_data(at::Tensor& t) {
  return reinterpret_cast<T*>(t.mutable_data_ptr<torch_t<T>>());
}

// Asks for large pages under a tensor that is about to be written for the first time: the gradient
// of a pool is hundreds of MB, and faulting it in 4 KiB at a time takes as long as computing it.
inline void advise_large_pages([[maybe_unused]] const at::Tensor& t) {
#ifdef __linux__
  constexpr uintptr_t kLargePage = 2 << 20;
  const auto begin = reinterpret_cast<uintptr_t>(t.const_data_ptr());
  const uintptr_t first = (begin + kLargePage - 1) / kLargePage * kLargePage;
  const uintptr_t last = (begin + t.nbytes()) / kLargePage * kLargePage;
  if (first < last) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#endif
}

// Runs task(i) for i in [0, tasks), each thread taking the next one when it is free: tasks may
// differ in length. make_worker() is called once a thread and returns the callable, so that scratch
// memory can live in it. A task writes only its own outputs, so results do not depend on who runs
// it.
// flops: of all tasks; a thread more is worth waking for kFlopsPerThread of them.
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
