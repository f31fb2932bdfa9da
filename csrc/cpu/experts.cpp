// SPDX-License-Identifier: Apache-2.0
// grouped_mm, its input and weight gradients, and the fused expert MLP.
//
// Work is cut into tasks of one expert and at most kMaxRows of its sorted rows (weight gradients:
// one expert and kSlab rows of its weight). A task gathers its rows, streams the expert's weights
// once and keeps the rest in cache; it owns its outputs, so results do not depend on the number of
// threads. Forward products are computed transposed (weights [n, K] as they lie times rows^T [K,
// R]), input gradients directly (rows [R, n] times weights [n, K] as they lie): no weight is ever
// transposed.
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
#include "ops/checks.h"
#include "unipool/nvtx.h"

namespace unipool::cpu {
namespace {

constexpr int64_t kMaxRows = 128;  // of a task
constexpr int64_t kLane = 16;      // the transposed products' columns are padded to this
constexpr int64_t kTile = 64;      // rows of weights in a product, transposed direction
constexpr int64_t kWide = 256;     // columns (and depth) of a block of weights, direct direction
constexpr int64_t kSlab = 512;     // weight rows of a weight gradient's task
constexpr int64_t kDepth = 256;    // rows that a weight gradient takes at a time

struct Task {
  int64_t expert;
  int64_t begin;  // sorted rows
  int64_t end;
  int64_t rows() const { return end - begin; }
};

std::vector<Task> make_tasks(const int32_t* offsets, int64_t experts) {
  std::vector<Task> tasks;
  for (int64_t e = 0; e < experts; ++e) {
    const int64_t rows = offsets[e + 1] - offsets[e];
    if (rows == 0) continue;
    const int64_t parts = (rows + kMaxRows - 1) / kMaxRows;
    const int64_t step = round_up((rows + parts - 1) / parts, kLane);
    for (int64_t at = 0; at < rows; at += step) {
      tasks.push_back({e, offsets[e] + at, offsets[e] + std::min(rows, at + step)});
    }
  }
  return tasks;
}

// The kernel for a dtype: f(Kernel()). Pairs need an even depth in every product.
template <class F>
void with_kernel(at::ScalarType dtype, bool even, F f) {
  if (dtype == at::kDouble) {
    f(AccKernel<double>());
  } else if (dtype == at::kFloat) {
    f(AccKernel<float>());
  } else if (even && has_pairs_product()) {
    f(PairsKernel());
  } else {
    f(AccKernel<bf16>());
  }
}

// Memory of one thread, reused from task to task.
template <class K>
struct Worker {
  using T = typename K::Element;
  using Acc = typename K::Acc;
  std::vector<const T*> sources;
  std::vector<T*> targets;
  Scratch<typename K::Packed> rows;     // the task's rows as an operand
  Scratch<typename K::Packed> weights;  // a block of weights as an operand
  Scratch<typename K::Packed> hidden;
  Scratch<Acc> tile;
  Scratch<Acc> tile2;
  Scratch<Acc> row_scale;
  ProductScope scope;
};

// C [R, n] = A [R, k] B [k, n] with B a block of an expert's weights [k, ld], read in order.
template <class K>
void direct_product(int64_t rows, int64_t n, int64_t k, Operand<typename K::Packed> a,
                    const typename K::Element* weights, int64_t ld,
                    Scratch<typename K::Packed>& scratch, typename K::Acc* c) {
  for (int64_t i = 0; i < k; i += kWide) {
    const int64_t depth = std::min(kWide, k - i);
    const auto b = K::b(weights + i * ld, ld, depth, n, scratch);
    K::run(rows, n, depth, {a.data + i, a.ld}, b, c, n, i > 0);
  }
}

template <class T>
void zero_rows(T* x, int64_t begin, int64_t end, int64_t width) {
  if (begin < end) {
    std::memset(static_cast<void*>(x + begin * width), 0, (end - begin) * width * sizeof(T));
  }
}

// --- grouped_mm

at::Tensor grouped_mm(const at::Tensor& a_in, const at::Tensor& b_in,
                      const at::Tensor& offsets_in) {
  UNIPOOL_NVTX_RANGE("grouped_mm");
  const auto s = check_grouped_mm(a_in, b_in, offsets_in);
  const auto a = a_in.contiguous();
  const auto b = b_in.contiguous();
  const auto offsets = offsets_in.contiguous();
  check_offsets_values("grouped_mm", offsets, s.rows);
  auto out = at::empty({s.rows, s.n}, a.options());
  const int32_t* o = data<int32_t>(offsets);
  const auto tasks = make_tasks(o, s.experts);
  with_kernel(a.scalar_type(), s.k % 2 == 0, [&](auto kernel) {
    using K = decltype(kernel);
    using T = typename K::Element;
    const T* rows = data<T>(a);
    const T* weights = data<T>(b);
    T* y = mutable_data<T>(out);
    zero_rows(y, o[s.experts], s.rows, s.n);
    parallel_tasks(tasks.size(), 2.0 * s.rows * s.n * s.k, [&] {
      return [&, w = Worker<K>()](int64_t i) mutable {
        const Task& task = tasks[i];
        const int64_t ld = round_up(task.rows(), kLane);
        w.sources.clear();
        w.targets.clear();
        for (int64_t r = task.begin; r < task.end; ++r) {
          w.sources.push_back(rows + r * s.k);
          w.targets.push_back(y + r * s.n);
        }
        const auto x = K::b_transposed(w.sources.data(), task.rows(), s.k, ld, w.rows);
        auto* tile = w.tile.get(kTile * ld);
        for (int64_t j = 0; j < s.n; j += kTile) {
          const int64_t n = std::min(kTile, s.n - j);
          const auto block = K::a(weights + (task.expert * s.n + j) * s.k, s.k, n, s.k, w.weights);
          K::run(n, ld, s.k, block, x, tile, ld, false);
          loops<T>().store_transposed(tile, ld, task.rows(), n, nullptr, w.targets.data(), j);
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
  auto out = at::empty({s.rows, s.k}, grad.options());
  const int32_t* o = data<int32_t>(offsets);
  const auto tasks = make_tasks(o, s.experts);
  with_kernel(grad.scalar_type(), s.n % 2 == 0, [&](auto kernel) {
    using K = decltype(kernel);
    using T = typename K::Element;
    const T* dy = data<T>(grad);
    const T* weights = data<T>(b);
    T* dx = mutable_data<T>(out);
    zero_rows(dx, o[s.experts], s.rows, s.k);
    parallel_tasks(tasks.size(), 2.0 * s.rows * s.n * s.k, [&] {
      return [&, w = Worker<K>()](int64_t i) mutable {
        const Task& task = tasks[i];
        const int64_t rows = task.rows();
        const auto a = K::a(dy + task.begin * s.n, s.n, rows, s.n, w.rows);
        const T* expert = weights + task.expert * s.n * s.k;
        for (int64_t j = 0; j < s.k; j += kWide) {
          const int64_t n = std::min(kWide, s.k - j);
          auto* tile = w.tile.get(rows * n);
          direct_product<K>(rows, n, s.n, a, expert + j, s.k, w.weights, tile);
          for (int64_t r = 0; r < rows; ++r) {
            loops<T>().store(1, tile + r * n, dx + (task.begin + r) * s.k + j, n);
          }
        }
      };
    });
  });
  return out;
}

// --- weight gradients

// The sorted rows of one operand of a weight gradient: row r of a segment is its row `r` (top_k 0)
// or that of token order[r] / top_k.
template <class T>
struct SegmentRows {
  const T* base;
  const int32_t* order;
  int64_t width;
  int64_t top_k;
  const T* row(int64_t r) const { return base + (top_k > 0 ? order[r] / top_k : r) * width; }
};

// The operands of a weight gradient, contiguous and checked.
struct WgradSegments {
  std::vector<at::Tensor> grad, input, order, offsets;

  WgradSegments(const WgradShape& s, at::TensorList grad_in, at::TensorList input_in,
                at::TensorList order_in, at::TensorList offsets_in, int64_t grad_top_k) {
    for (size_t i = 0; i < grad_in.size(); ++i) {
      grad.push_back(grad_in[i].contiguous());
      input.push_back(input_in[i].contiguous());
      offsets.push_back(offsets_in[i].contiguous());
      const int64_t rows = grad[i].size(0) * std::max<int64_t>(grad_top_k, 1);
      check_offsets_values("grouped_wgrad", offsets[i], rows);
      if (order_in.empty()) continue;
      order.push_back(order_in[i].contiguous());
      check_order_values("grouped_wgrad", order[i], rows, data<int32_t>(offsets[i])[s.experts]);
    }
  }
};

// out [M, n, K] (+)= the sum over segments; Out is the operands' type or its acc type.
template <class K, class Out>
void weight_gradient(const WgradShape& s, const WgradSegments& segments, int64_t grad_top_k,
                     int64_t input_top_k, bool add, Out* out) {
  using T = typename K::Element;
  using Acc = typename K::Acc;
  constexpr bool kDirect = std::is_same_v<Out, Acc>;  // products are written to out themselves
  const int64_t slabs = (s.n + kSlab - 1) / kSlab;
  const size_t count = segments.grad.size();
  std::vector<SegmentRows<T>> grads, inputs;
  double flops = 0;
  for (size_t i = 0; i < count; ++i) {
    flops += 2.0 * data<int32_t>(segments.offsets[i])[s.experts] * s.n * s.k;
    const int32_t* order = segments.order.empty() ? nullptr : data<int32_t>(segments.order[i]);
    grads.push_back({data<T>(segments.grad[i]), order, s.n, grad_top_k});
    inputs.push_back({data<T>(segments.input[i]), order, s.k, input_top_k});
  }
  parallel_tasks(s.experts * slabs, flops, [&] {
    return [&, w = Worker<K>(), grad_rows = std::vector<const T*>()](int64_t i) mutable {
      const int64_t e = i / slabs;
      const int64_t first = i % slabs * kSlab;
      const int64_t height = std::min(kSlab, s.n - first);
      Out* target = out + (e * s.n + first) * s.k;
      grad_rows.clear();
      w.sources.clear();
      for (size_t g = 0; g < count; ++g) {
        const int32_t* offsets = data<int32_t>(segments.offsets[g]);
        for (int64_t r = offsets[e]; r < offsets[e + 1]; ++r) {
          grad_rows.push_back(grads[g].row(r) + first);
          w.sources.push_back(inputs[g].row(r));
        }
      }
      const auto rows = static_cast<int64_t>(grad_rows.size());
      if (rows == 0) {
        if (!add) zero_rows(target, 0, height, s.k);
        return;
      }
      Acc* sum;
      if constexpr (kDirect) {
        sum = target;
      } else {
        sum = w.tile.get(height * s.k);
      }
      for (int64_t at = 0; at < rows; at += kDepth) {
        const int64_t depth = std::min(kDepth, rows - at);
        const auto b = K::b_gathered(w.sources.data() + at, depth, s.k, w.rows);
        const auto a = K::a_transposed(grad_rows.data() + at, depth, height, w.weights);
        for (int64_t j = 0; j < height; j += kTile) {
          const int64_t n = std::min(kTile, height - j);
          K::run(n, s.k, K::padded_k(depth), {a.data + j * a.ld, a.ld}, b, sum + j * s.k, s.k,
                 add || at > 0);
        }
      }
      if constexpr (!kDirect) loops<T>().store(1, sum, target, height * s.k);
    };
  });
}

at::Tensor grouped_wgrad(at::TensorList grad, at::TensorList input, at::TensorList order,
                         at::TensorList offsets, int64_t grad_top_k, int64_t input_top_k,
                         std::optional<at::ScalarType> out_dtype) {
  UNIPOOL_NVTX_RANGE("grouped_wgrad");
  const auto s = check_grouped_wgrad(grad, input, order, offsets, grad_top_k, input_top_k);
  const auto dtype = check_wgrad_dtype(grad, out_dtype);
  const WgradSegments segments(s, grad, input, order, offsets, grad_top_k);
  auto out = at::empty({s.experts, s.n, s.k}, grad[0].options().dtype(dtype));
  advise_large_pages(out);
  with_kernel(grad[0].scalar_type(), true, [&](auto kernel) {
    using K = decltype(kernel);
    using T = typename K::Element;
    using Acc = typename K::Acc;
    if (dtype == acc_type(dtype)) {
      weight_gradient<K>(s, segments, grad_top_k, input_top_k, false, mutable_data<Acc>(out));
    } else {
      weight_gradient<K>(s, segments, grad_top_k, input_top_k, false, mutable_data<T>(out));
    }
  });
  return out;
}

void grouped_wgrad_(at::Tensor& sum, at::TensorList grad, at::TensorList input,
                    at::TensorList order, at::TensorList offsets, int64_t grad_top_k,
                    int64_t input_top_k) {
  UNIPOOL_NVTX_RANGE("grouped_wgrad_");
  const auto s = check_grouped_wgrad(grad, input, order, offsets, grad_top_k, input_top_k);
  check_wgrad_sum(sum, s, grad);
  const WgradSegments segments(s, grad, input, order, offsets, grad_top_k);
  with_kernel(grad[0].scalar_type(), true, [&](auto kernel) {
    using K = decltype(kernel);
    weight_gradient<K>(s, segments, grad_top_k, input_top_k, true,
                       mutable_data<typename K::Acc>(sum));
  });
}

// --- expert_mlp

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

// Rows [T, D] of a layer's output, from tasks that hold sorted rows. With one expert a token a row
// is stored in its token's place; with more, sorted rows are kept in acc and summed in slot order.
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
  T* token_row(int64_t r) const { return out_ + order_[r] * shape_.d_model; }
  Acc* sorted_row(int64_t r) const { return rows_ + r * shape_.d_model; }

  // Sums the slots of each token; a token all of whose slots were dropped gets zeros.
  void finish() const {
    at::parallel_for(0, shape_.tokens, kTile, [&](int64_t begin, int64_t end) {
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
          loops<Acc>().axpy(1, sorted_row(rows[j]), sum.data(), shape_.d_model);
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

// One task of the forward pass: hidden = silu(gate) * up for its rows, then down_proj.
template <class K>
void forward_task(const Task& task, const Layer& layer, const TokenRows<typename K::Element>& out,
                  typename K::Element* preact, Worker<K>& w) {
  using T = typename K::Element;
  using Acc = typename K::Acc;
  const auto& s = layer.shape;
  const int64_t rows = task.rows();
  const int64_t ld = round_up(rows, kLane);
  const int32_t* order = data<int32_t>(layer.order);
  const T* gate_up = data<T>(layer.gate_up) + task.expert * 2 * s.d_ff * s.d_model;
  const T* down = data<T>(layer.down) + task.expert * s.d_model * s.d_ff;

  w.sources.clear();
  w.targets.clear();
  Acc* scale = w.row_scale.get(rows);
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t slot = order[task.begin + r];
    w.sources.push_back(data<T>(layer.x) + slot / s.top_k * s.d_model);
    if (preact != nullptr) w.targets.push_back(preact + (task.begin + r) * 2 * s.d_ff);
    scale[r] = data<Acc>(layer.weights)[slot];
  }
  const auto x = K::b_transposed(w.sources.data(), rows, s.d_model, ld, w.rows);
  auto* hidden = w.hidden.get(s.d_ff * ld);
  Acc* gate = w.tile.get(kTile * ld);
  Acc* up = w.tile2.get(kTile * ld);
  for (int64_t f = 0; f < s.d_ff; f += kTile) {
    const int64_t n = std::min(kTile, s.d_ff - f);
    const auto gate_block = K::a(gate_up + f * s.d_model, s.d_model, n, s.d_model, w.weights);
    K::run(n, ld, s.d_model, gate_block, x, gate, ld, false);
    const auto up_block =
        K::a(gate_up + (s.d_ff + f) * s.d_model, s.d_model, n, s.d_model, w.weights);
    K::run(n, ld, s.d_model, up_block, x, up, ld, false);
    if (preact != nullptr) {
      loops<T>().store_transposed(gate, ld, rows, n, nullptr, w.targets.data(), f);
      loops<T>().store_transposed(up, ld, rows, n, nullptr, w.targets.data(), s.d_ff + f);
    }
    K::swiglu_into(gate, up, n, ld, hidden, f);
  }

  std::vector<Acc*> sorted;
  w.targets.clear();
  for (int64_t r = task.begin; r < task.end; ++r) {
    if (out.direct()) {
      w.targets.push_back(out.token_row(r));
    } else {
      sorted.push_back(out.sorted_row(r));
    }
  }
  for (int64_t d = 0; d < s.d_model; d += kTile) {
    const int64_t n = std::min(kTile, s.d_model - d);
    const auto block = K::a(down + d * s.d_ff, s.d_ff, n, s.d_ff, w.weights);
    K::run(n, ld, s.d_ff, block, {hidden, ld}, gate, ld, false);
    if (out.direct()) {
      loops<T>().store_transposed(gate, ld, rows, n, scale, w.targets.data(), d);
    } else {
      loops<Acc>().store_transposed(gate, ld, rows, n, scale, sorted.data(), d);
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
  with_kernel(x.scalar_type(), layer.even(), [&](auto kernel) {
    using K = decltype(kernel);
    using T = typename K::Element;
    T* preact = keep_preact ? mutable_data<T>(out.preact) : nullptr;
    const TokenRows<T> rows(layer, out.y);
    if (keep_preact) zero_rows(preact, layer.valid_rows(), s.rows(), 2 * s.d_ff);
    parallel_tasks(tasks.size(), s.flops(), [&] {
      return [&, w = Worker<K>()](int64_t i) mutable {
        forward_task<K>(tasks[i], layer, rows, preact, w);
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
  T* grad_preact;
  T* hidden;
};

// One task of the backward pass; layer.x holds the gradient of the output.
template <class K>
void backward_task(const Task& task, const Layer& layer, const TokenRows<typename K::Element>& out,
                   const BackwardPointers<typename K::Element>& p, Worker<K>& w) {
  using T = typename K::Element;
  using Acc = typename K::Acc;
  const auto& s = layer.shape;
  const int64_t rows = task.rows();
  const int32_t* order = data<int32_t>(layer.order);
  const T* gate_up = data<T>(layer.gate_up) + task.expert * 2 * s.d_ff * s.d_model;
  const T* down = data<T>(layer.down) + task.expert * s.d_model * s.d_ff;

  w.sources.clear();
  Acc* grad_weight = w.row_scale.get(rows);
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t slot = order[task.begin + r];
    w.sources.push_back(data<T>(layer.x) + slot / s.top_k * s.d_model);
    grad_weight[r] = 0;
  }
  const auto dy = K::a_gathered(w.sources.data(), rows, s.d_model, w.rows);
  for (int64_t f = 0; f < s.d_ff; f += kWide) {
    const int64_t n = std::min(kWide, s.d_ff - f);
    Acc* grad_hidden = w.tile.get(rows * n);
    direct_product<K>(rows, n, s.d_model, dy, down + f, s.d_ff, w.weights, grad_hidden);
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t row = task.begin + r;
      const int64_t gate = row * 2 * s.d_ff + f;
      grad_weight[r] +=
          loops<T>().swiglu_bwd(grad_hidden + r * n, p.preact + gate, p.preact + gate + s.d_ff,
                                data<Acc>(layer.weights)[order[row]], p.grad_preact + gate,
                                p.grad_preact + gate + s.d_ff, p.hidden + row * s.d_ff + f, n);
    }
  }
  for (int64_t r = 0; r < rows; ++r) p.grad_weights[order[task.begin + r]] = grad_weight[r];

  const auto grad_preact =
      K::a(p.grad_preact + task.begin * 2 * s.d_ff, 2 * s.d_ff, rows, 2 * s.d_ff, w.hidden);
  for (int64_t d = 0; d < s.d_model; d += kWide) {
    const int64_t n = std::min(kWide, s.d_model - d);
    Acc* tile = w.tile.get(rows * n);
    direct_product<K>(rows, n, 2 * s.d_ff, grad_preact, gate_up + d, s.d_model, w.weights, tile);
    for (int64_t r = 0; r < rows; ++r) {
      if (out.direct()) {
        loops<T>().store(1, tile + r * n, out.token_row(task.begin + r) + d, n);
      } else {
        std::memcpy(out.sorted_row(task.begin + r) + d, tile + r * n, n * sizeof(Acc));
      }
    }
  }
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> expert_mlp_bwd(
    const at::Tensor& grad, const at::Tensor& weights, const at::Tensor& gate_up,
    const at::Tensor& down, const at::Tensor& order, const at::Tensor& inverse,
    const at::Tensor& offsets, const at::Tensor& preact_in) {
  UNIPOOL_NVTX_RANGE("expert_mlp_bwd");
  const auto s =
      check_expert_mlp_bwd(grad, weights, gate_up, down, order, inverse, offsets, preact_in);
  const Layer layer("expert_mlp_bwd", s, grad, weights, gate_up, down, order, inverse, offsets);
  const auto preact = preact_in.contiguous();
  auto out = alloc_expert_mlp_bwd(s, layer.x, layer.weights);
  advise_large_pages(out.grad_preact);
  advise_large_pages(out.hidden);
  const auto tasks = layer.tasks();
  with_kernel(grad.scalar_type(), layer.even(), [&](auto kernel) {
    using K = decltype(kernel);
    using T = typename K::Element;
    using Acc = typename K::Acc;
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
      return [&, w = Worker<K>()](int64_t i) mutable {
        backward_task<K>(tasks[i], layer, rows, p, w);
      };
    });
    rows.finish();
  });
  return {out.grad_x, out.grad_weights, out.grad_preact, out.hidden};
}

}  // namespace
}  // namespace unipool::cpu

TORCH_LIBRARY_IMPL(unipool, CPU, m) {
  m.impl("grouped_mm", &unipool::cpu::grouped_mm);
  m.impl("grouped_mm_bwd_a", &unipool::cpu::grouped_mm_bwd_a);
  m.impl("grouped_wgrad", &unipool::cpu::grouped_wgrad);
  m.impl("grouped_wgrad_", &unipool::cpu::grouped_wgrad_);
  m.impl("expert_mlp", &unipool::cpu::expert_mlp);
  m.impl("expert_mlp_bwd", &unipool::cpu::expert_mlp_bwd);
}
