// SPDX-License-Identifier: Apache-2.0
// How the expert ops cut their work: a task is one expert and at most kMaxRows of its sorted rows.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#include "cpu/gemm.h"
#include "cpu/parallel.h"
#include "cpu/tensor.h"

namespace unipool::cpu {

struct Task {
  int64_t expert;
  int64_t begin;  // sorted rows
  int64_t end;
  int64_t rows() const { return end - begin; }
};

inline std::vector<Task> make_tasks(const int32_t* offsets, int64_t experts) {
  constexpr int64_t kMaxRows = 128;
  constexpr int64_t kMultiple = 16;  // tasks of an expert but its last one
  std::vector<Task> tasks;
  for (int64_t e = 0; e < experts; ++e) {
    const int64_t rows = offsets[e + 1] - offsets[e];
    if (rows == 0) continue;
    const int64_t parts = (rows + kMaxRows - 1) / kMaxRows;
    const int64_t step = round_up((rows + parts - 1) / parts, kMultiple);
    for (int64_t at = 0; at < rows; at += step) {
      tasks.push_back({e, offsets[e] + at, offsets[e] + std::min(rows, at + step)});
    }
  }
  return tasks;
}

// f(Type<P>) for the products P (gemm.h) of a dtype. even: the depth of every product is even.
template <class F>
void with_products(at::ScalarType dtype, bool even, F f) {
  if (dtype == at::kDouble) {
    f(Type<TileProducts<WideTiles<double>>>());
  } else if (dtype == at::kFloat) {
    f(Type<TileProducts<WideTiles<float>>>());
  } else if (bf16_products() != nullptr) {
    f(Type<DotProducts>());
  } else if (even && has_pairs_product()) {
    f(Type<TileProducts<PairTiles>>());
  } else {
    f(Type<TileProducts<WideTiles<bf16>>>());
  }
}

template <class T>
void zero_rows(T* x, int64_t begin, int64_t end, int64_t width) {
  if (begin < end) {
    std::memset(static_cast<void*>(x + begin * width), 0, (end - begin) * width * sizeof(T));
  }
}

}  // namespace unipool::cpu
