// SPDX-License-Identifier: Apache-2.0
// Rows times the matrix of their expert, and the gradient of the rows. A task is one expert and
// some of its rows; it owns its outputs, so results do not depend on the number of threads.
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <torch/library.h>

#include <algorithm>
#include <vector>

#include "cpu/gemm.h"
#include "cpu/parallel.h"
#include "cpu/simd/loops.h"
#include "cpu/tasks.h"
#include "cpu/tensor.h"
#include "ops/checks.h"
#include "unipool/nvtx.h"

namespace unipool::cpu {
namespace {

constexpr int64_t kColumns = 64;  // of a task's result that are in cache at a time

// --- grouped_mm

at::Tensor grouped_mm(const at::Tensor& a_in, const at::Tensor& b_in,
                      const at::Tensor& offsets_in) {
  UNIPOOL_NVTX_RANGE("grouped_mm");
  const auto s = check_grouped_mm(a_in, b_in, offsets_in);
  const auto a = a_in.contiguous();
  const auto b = b_in.contiguous();
  const auto offsets = offsets_in.contiguous();
  check_offsets_values("grouped_mm", offsets, s.rows);
  auto out = alloc_grouped_mm(s, a);
  const int32_t* o = data<int32_t>(offsets);
  const auto tasks = make_tasks(o, s.experts);
  with_products(a.scalar_type(), s.k % 2 == 0, [&](auto tag) {
    using Products = typename decltype(tag)::type;
    using T = typename Products::Element;
    using Acc = typename Products::Acc;
    const T* rows = data<T>(a);
    const T* weights = data<T>(b);
    T* y = mutable_data<T>(out);
    zero_rows(y, o[s.experts], s.rows, s.n);
    parallel_tasks(tasks.size(), 2.0 * s.rows * s.n * s.k, [&] {
      return [&, products = Products(), sources = std::vector<const T*>(),
              scratch = Scratch<Acc>()](int64_t i) mutable {
        const Task& task = tasks[i];
        sources.clear();
        for (int64_t r = task.begin; r < task.end; ++r) sources.push_back(rows + r * s.k);
        products.rows_nt(sources.data(), task.rows(), s.k);
        Acc* tile = scratch.get(task.rows() * kColumns);
        for (int64_t j = 0; j < s.n; j += kColumns) {
          const int64_t n = std::min(kColumns, s.n - j);
          products.nt(weights + (task.expert * s.n + j) * s.k, s.k, n, tile, kColumns);
          for (int64_t r = 0; r < task.rows(); ++r) {
            loops<T>().store(1, tile + r * kColumns, y + (task.begin + r) * s.n + j, n);
          }
        }
      };
    });
  });
  return out;
}

at::Tensor grouped_mm_bwd_a(const at::Tensor& grad_in, const at::Tensor& b_in,
                            const at::Tensor& offsets_in) {
  UNIPOOL_NVTX_RANGE("grouped_mm_bwd_a");
  const auto s = check_grouped_mm_bwd_a(grad_in, b_in, offsets_in);
  const auto grad = grad_in.contiguous();
  const auto b = b_in.contiguous();
  const auto offsets = offsets_in.contiguous();
  check_offsets_values("grouped_mm_bwd_a", offsets, s.rows);
  auto out = alloc_grouped_mm_bwd_a(s, grad);
  const int32_t* o = data<int32_t>(offsets);
  const auto tasks = make_tasks(o, s.experts);
  with_products(grad.scalar_type(), s.n % 2 == 0, [&](auto tag) {
    using Products = typename decltype(tag)::type;
    using T = typename Products::Element;
    using Acc = typename Products::Acc;
    const T* dy = data<T>(grad);
    const T* weights = data<T>(b);
    T* dx = mutable_data<T>(out);
    zero_rows(dx, o[s.experts], s.rows, s.k);
    parallel_tasks(tasks.size(), 2.0 * s.rows * s.n * s.k, [&] {
      return [&, products = Products(), scratch = Scratch<Acc>()](int64_t i) mutable {
        const Task& task = tasks[i];
        products.rows_nn(dy + task.begin * s.n, s.n, task.rows(), s.n);
        Acc* result = scratch.get(task.rows() * s.k);
        products.nn(weights + task.expert * s.n * s.k, s.k, s.k, result, s.k);
        loops<T>().store(1, result, dx + task.begin * s.k, task.rows() * s.k);
      };
    });
  });
  return out;
}

}  // namespace
}  // namespace unipool::cpu

TORCH_LIBRARY_IMPL(unipool, CPU, m) {
  m.impl("grouped_mm", &unipool::cpu::grouped_mm);
  m.impl("grouped_mm_bwd_a", &unipool::cpu::grouped_mm_bwd_a);
}
