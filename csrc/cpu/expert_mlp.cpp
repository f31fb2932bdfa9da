// SPDX-License-Identifier: Apache-2.0
// The fused expert MLP. A task is one expert and at most 128 of its sorted rows: it gathers them,
// streams the expert's weights once and keeps the rest in cache; it owns its outputs, so results do
// not depend on the number of threads.
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <cstring>
#include <tuple>
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

constexpr int64_t kColumns = 64;      // of hidden (forward) that are in cache at a time
constexpr int64_t kColumnsBwd = 256;  // of hidden and of the input, in backward

// The tensors of a layer call, contiguous, and their checked plan.
struct Layer {
  at::Tensor x, weights, gate_up, down, order, inverse, offsets;
  ExpertShape shape;

  Layer(const char* op, const ExpertShape& s, const at::Tensor& x_in, const at::Tensor& weights_in,
        const at::Tensor& gate_up_in, const at::Tensor& down_in, const at::Tensor& order_in,
        const at::Tensor& inverse_in, const at::Tensor& offsets_in)
      : x(x_in.contiguous()),
        weights(weights_in.contiguous()),
        gate_up(gate_up_in.contiguous()),
        down(down_in.contiguous()),
        order(order_in.contiguous()),
        inverse(inverse_in.contiguous()),
        offsets(offsets_in.contiguous()),
        shape(s) {
    check_offsets_values(op, offsets, s.rows());
    check_order_values(op, order, s.rows(), valid_rows());
    check_index_values(op, "inverse", inverse, s.rows());
  }

  int64_t valid_rows() const { return data<int32_t>(offsets)[shape.experts]; }
  std::vector<Task> tasks() const { return make_tasks(data<int32_t>(offsets), shape.experts); }
  bool even() const { return shape.d_model % 2 == 0 && shape.d_ff % 2 == 0; }
};

// Rows [T, D] of a layer's output, from tasks that hold sorted rows. With one expert per token a
// row is stored in its token's place; with more, sorted rows are kept in acc and summed in slot
// order.
template <class T>
class TokenRows {
 public:
  using Acc = acc_t<T>;

  TokenRows(const Layer& layer, at::Tensor& out)
      : shape_(layer.shape),
        order_(data<int32_t>(layer.order)),
        inverse_(data<int32_t>(layer.inverse)),
        out_(mutable_data<T>(out)) {
    if (!direct()) {
      sorted_ = at::empty({layer.shape.rows(), layer.shape.d_model},
                          out.options().dtype(acc_type(out.scalar_type())));
      rows_ = mutable_data<Acc>(sorted_);
    }
  }

  bool direct() const { return shape_.top_k == 1; }

  // Columns [column, column + n) of sorted row r, times scale.
  void store(int64_t r, int64_t column, Acc scale, const Acc* x, int64_t n) const {
    const int64_t d = shape_.d_model;
    if (direct()) {
      loops<T>().store(scale, x, out_ + order_[r] * d + column, n);
    } else {
      loops<Acc>().store(scale, x, rows_ + r * d + column, n);
    }
  }

  // Sums the slots of each token; a token all of whose slots were dropped gets zeros.
  void finish() const {
    at::parallel_for(0, shape_.tokens, 64, [&](int64_t begin, int64_t end) {
      std::vector<Acc> sum(shape_.d_model);
      for (int64_t t = begin; t < end; ++t) {
        const int32_t* rows = inverse_ + t * shape_.top_k;
        if (direct()) {
          if (rows[0] < 0) zero_rows(out_, t, t + 1, shape_.d_model);
          continue;
        }
        std::fill(sum.begin(), sum.end(), Acc(0));
        for (int64_t j = 0; j < shape_.top_k; ++j) {
          if (rows[j] < 0) continue;
          loops<Acc>().axpy(1, rows_ + rows[j] * shape_.d_model, sum.data(), shape_.d_model);
        }
        loops<T>().store(1, sum.data(), out_ + t * shape_.d_model, shape_.d_model);
      }
    });
  }

 private:
  ExpertShape shape_;
  const int32_t* order_;
  const int32_t* inverse_;
  T* out_;
  at::Tensor sorted_;
  Acc* rows_ = nullptr;
};

// What a thread keeps from task to task.
template <class Products>
struct Worker {
  using T = typename Products::Element;
  using Acc = typename Products::Acc;
  Products products;
  std::vector<const T*> sources;
  Scratch<T> hidden;
  Scratch<Acc> tile;
  Scratch<Acc> row_sums;

  // Pointers to the rows of x that a task's slots come from.
  const T* const* gather_sources(const Task& task, const Layer& layer) {
    const int32_t* order = data<int32_t>(layer.order);
    sources.clear();
    for (int64_t r = task.begin; r < task.end; ++r) {
      sources.push_back(data<T>(layer.x) + order[r] / layer.shape.top_k * layer.shape.d_model);
    }
    return sources.data();
  }
};

// One task of the forward pass: hidden = silu(gate) * up for its rows, then down_proj.
template <class Products>
void forward_task(const Task& task, const Layer& layer,
                  const TokenRows<typename Products::Element>& out,
                  typename Products::Element* preact, Worker<Products>& w) {
  using T = typename Products::Element;
  using Acc = typename Products::Acc;
  const auto& s = layer.shape;
  const int64_t rows = task.rows();
  const T* gate_up = data<T>(layer.gate_up) + task.expert * 2 * s.d_ff * s.d_model;
  const T* down = data<T>(layer.down) + task.expert * s.d_model * s.d_ff;

  w.products.rows_nt(w.gather_sources(task, layer), rows, s.d_model);
  T* hidden = w.hidden.get(rows * s.d_ff);
  Acc* gate = w.tile.get(2 * rows * kColumns);
  Acc* up = gate + rows * kColumns;
  for (int64_t f = 0; f < s.d_ff; f += kColumns) {
    const int64_t n = std::min(kColumns, s.d_ff - f);
    w.products.nt(gate_up + f * s.d_model, s.d_model, n, gate, kColumns);
    w.products.nt(gate_up + (s.d_ff + f) * s.d_model, s.d_model, n, up, kColumns);
    for (int64_t r = 0; r < rows; ++r) {
      T* kept = preact == nullptr ? nullptr : preact + (task.begin + r) * 2 * s.d_ff + f;
      T* kept_up = preact == nullptr ? nullptr : kept + s.d_ff;
      loops<T>().swiglu(gate + r * kColumns, up + r * kColumns, kept, kept_up,
                        hidden + r * s.d_ff + f, n);
    }
  }

  w.sources.clear();
  for (int64_t r = 0; r < rows; ++r) w.sources.push_back(hidden + r * s.d_ff);
  w.products.rows_nt(w.sources.data(), rows, s.d_ff);
  const int32_t* order = data<int32_t>(layer.order);
  for (int64_t d = 0; d < s.d_model; d += kColumns) {
    const int64_t n = std::min(kColumns, s.d_model - d);
    w.products.nt(down + d * s.d_ff, s.d_ff, n, gate, kColumns);
    for (int64_t r = 0; r < rows; ++r) {
      const Acc weight = data<Acc>(layer.weights)[order[task.begin + r]];
      out.store(task.begin + r, d, weight, gate + r * kColumns, n);
    }
  }
}

std::tuple<at::Tensor, at::Tensor> expert_mlp(const at::Tensor& x, const at::Tensor& weights,
                                              const at::Tensor& gate_up, const at::Tensor& down,
                                              const at::Tensor& order, const at::Tensor& inverse,
                                              const at::Tensor& offsets, bool keep_preact) {
  UNIPOOL_NVTX_RANGE("expert_mlp");
  const auto s = check_expert_mlp(x, weights, gate_up, down, order, inverse, offsets);
  const Layer layer("expert_mlp", s, x, weights, gate_up, down, order, inverse, offsets);
  auto out = alloc_expert_mlp(s, layer.x, keep_preact);
  advise_large_pages(out.preact);
  const auto tasks = layer.tasks();
  with_products(x.scalar_type(), layer.even(), [&](auto tag) {
    using Products = typename decltype(tag)::type;
    using T = typename Products::Element;
    T* preact = keep_preact ? mutable_data<T>(out.preact) : nullptr;
    const TokenRows<T> rows(layer, out.y);
    if (keep_preact) zero_rows(preact, layer.valid_rows(), s.rows(), 2 * s.d_ff);
    parallel_tasks(tasks.size(), s.flops(), [&] {
      return [&, w = Worker<Products>()](int64_t i) mutable {
        forward_task(tasks[i], layer, rows, preact, w);
      };
    });
    rows.finish();
  });
  return {out.y, out.preact};
}

template <class T>
struct BackwardPointers {
  const T* preact;
  acc_t<T>* grad_weights;
  T* grad_preact;  // may be preact
  T* hidden;
};

// Brings n values into L2 while other work is done.
template <class T>
void fetch(const T* x, int64_t n) {
  constexpr int64_t kLine = 64 / sizeof(T);
  for (int64_t i = 0; i < n; i += kLine) __builtin_prefetch(x + i, 0, 2);
}

// One task of the backward pass; layer.x holds the gradient of the output.
template <class Products>
void backward_task(const Task& task, const Layer& layer,
                   const TokenRows<typename Products::Element>& out,
                   const BackwardPointers<typename Products::Element>& p, Worker<Products>& w) {
  using T = typename Products::Element;
  using Acc = typename Products::Acc;
  const auto& s = layer.shape;
  const int64_t rows = task.rows();
  const int32_t* order = data<int32_t>(layer.order);
  const T* gate_up = data<T>(layer.gate_up) + task.expert * 2 * s.d_ff * s.d_model;
  const T* down = data<T>(layer.down) + task.expert * s.d_model * s.d_ff;

  w.products.rows_nn(w.gather_sources(task, layer), rows, s.d_model);
  Acc* grad_weight = w.row_sums.get(rows);
  std::fill_n(grad_weight, rows, Acc(0));
  Acc* tile = w.tile.get(rows * kColumnsBwd);
  for (int64_t f = 0; f < s.d_ff; f += kColumnsBwd) {
    const int64_t n = std::min(kColumnsBwd, s.d_ff - f);
    // Written layers ago; each row's part is a place of its own.
    for (int64_t r = task.begin; r < task.end; ++r) {
      fetch(p.preact + r * 2 * s.d_ff + f, n);
      fetch(p.preact + (r * 2 + 1) * s.d_ff + f, n);
    }
    w.products.nn(down + f, s.d_ff, n, tile, kColumnsBwd);
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t row = task.begin + r;
      const int64_t gate = row * 2 * s.d_ff + f;
      grad_weight[r] +=
          loops<T>().swiglu_bwd(tile + r * kColumnsBwd, p.preact + gate, p.preact + gate + s.d_ff,
                                data<Acc>(layer.weights)[order[row]], p.grad_preact + gate,
                                p.grad_preact + gate + s.d_ff, p.hidden + row * s.d_ff + f, n);
    }
  }
  for (int64_t r = 0; r < rows; ++r) p.grad_weights[order[task.begin + r]] = grad_weight[r];

  w.products.rows_nn(p.grad_preact + task.begin * 2 * s.d_ff, 2 * s.d_ff, rows, 2 * s.d_ff);
  for (int64_t d = 0; d < s.d_model; d += kColumnsBwd) {
    const int64_t n = std::min(kColumnsBwd, s.d_model - d);
    w.products.nn(gate_up + d, s.d_model, n, tile, kColumnsBwd);
    for (int64_t r = 0; r < rows; ++r) {
      out.store(task.begin + r, d, 1, tile + r * kColumnsBwd, n);
    }
  }
}

// out.grad_preact may be preact itself.
void backward(const Layer& layer, const at::Tensor& preact, ExpertGrads& out) {
  const auto& s = layer.shape;
  advise_large_pages(out.grad_preact);
  advise_large_pages(out.hidden);
  const auto tasks = layer.tasks();
  with_products(layer.x.scalar_type(), layer.even(), [&](auto tag) {
    using Products = typename decltype(tag)::type;
    using T = typename Products::Element;
    using Acc = typename Products::Acc;
    const BackwardPointers<T> p{data<T>(preact), mutable_data<Acc>(out.grad_weights),
                                mutable_data<T>(out.grad_preact), mutable_data<T>(out.hidden)};
    const TokenRows<T> rows(layer, out.grad_x);
    const int32_t* inverse_rows = data<int32_t>(layer.inverse);
    for (int64_t slot = 0; slot < s.rows(); ++slot) {
      if (inverse_rows[slot] < 0) p.grad_weights[slot] = 0;
    }
    zero_rows(p.grad_preact, layer.valid_rows(), s.rows(), 2 * s.d_ff);
    zero_rows(p.hidden, layer.valid_rows(), s.rows(), s.d_ff);
    parallel_tasks(tasks.size(), s.flops(), [&] {
      return [&, w = Worker<Products>()](int64_t i) mutable {
        backward_task(tasks[i], layer, rows, p, w);
      };
    });
    rows.finish();
  });
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> expert_mlp_bwd(
    const at::Tensor& grad, const at::Tensor& weights, const at::Tensor& gate_up,
    const at::Tensor& down, const at::Tensor& order, const at::Tensor& inverse,
    const at::Tensor& offsets, const at::Tensor& preact) {
  UNIPOOL_NVTX_RANGE("expert_mlp_bwd");
  const auto s =
      check_expert_mlp_bwd(grad, weights, gate_up, down, order, inverse, offsets, preact);
  const Layer layer("expert_mlp_bwd", s, grad, weights, gate_up, down, order, inverse, offsets);
  auto out = alloc_expert_mlp_bwd(s, layer.x, layer.weights);
  backward(layer, preact.contiguous(), out);
  return {out.grad_x, out.grad_weights, out.grad_preact, out.hidden};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> expert_mlp_bwd_(
    const at::Tensor& grad, const at::Tensor& weights, const at::Tensor& gate_up,
    const at::Tensor& down, const at::Tensor& order, const at::Tensor& inverse,
    const at::Tensor& offsets, at::Tensor& preact) {
  UNIPOOL_NVTX_RANGE("expert_mlp_bwd_");
  const auto s =
      check_expert_mlp_bwd_(grad, weights, gate_up, down, order, inverse, offsets, preact);
  const Layer layer("expert_mlp_bwd_", s, grad, weights, gate_up, down, order, inverse, offsets);
  auto out = alloc_expert_mlp_bwd(s, layer.x, layer.weights, preact);
  backward(layer, preact, out);
  return {out.grad_x, out.grad_weights, out.hidden};
}

}  // namespace
}  // namespace unipool::cpu

TORCH_LIBRARY_IMPL(unipool, CPU, m) {
  m.impl("expert_mlp", &unipool::cpu::expert_mlp);
  m.impl("expert_mlp_bwd", &unipool::cpu::expert_mlp_bwd);
  m.impl("expert_mlp_bwd_", &unipool::cpu::expert_mlp_bwd_);
}
