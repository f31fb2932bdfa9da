// SPDX-License-Identifier: Apache-2.0
// The weight gradient of a pool over all segments. A task is one expert and some rows of its
// weight; it owns its outputs, so results do not depend on the number of threads.
#include <ATen/core/Tensor.h>
#include <torch/library.h>

#include <algorithm>
#include <vector>

#include "cpu/gemm.h"
#include "cpu/parallel.h"
#include "cpu/tasks.h"
#include "cpu/tensor.h"
#include "ops/checks.h"
#include "unipool/nvtx.h"

namespace unipool::cpu {
namespace {

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
template <class Products, class Out>
void weight_gradient(const WgradShape& s, const WgradSegments& segments, int64_t grad_top_k,
                     int64_t input_top_k, bool add, Out* out) {
  using T = typename Products::Element;
  constexpr int64_t kSlab = Products::kSlab;
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
    return [&, products = Products(), grad_rows = std::vector<const T*>(),
            input_rows = std::vector<const T*>()](int64_t i) mutable {
      const int64_t e = i / slabs;
      const int64_t first = i % slabs * kSlab;
      const int64_t height = std::min(kSlab, s.n - first);
      Out* target = out + (e * s.n + first) * s.k;
      grad_rows.clear();
      input_rows.clear();
      for (size_t g = 0; g < count; ++g) {
        const int32_t* offsets = data<int32_t>(segments.offsets[g]);
        for (int64_t r = offsets[e]; r < offsets[e + 1]; ++r) {
          grad_rows.push_back(grads[g].row(r) + first);
          input_rows.push_back(inputs[g].row(r));
        }
      }
      if (!grad_rows.empty()) {
        products.tn(grad_rows.data(), input_rows.data(), static_cast<int64_t>(grad_rows.size()),
                    height, s.k, target, add);
      } else if (!add) {
        zero_rows(target, 0, height, s.k);
      }
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
  auto out = alloc_grouped_wgrad(s, grad, dtype);
  advise_large_pages(out);
  with_products(grad[0].scalar_type(), true, [&](auto tag) {
    using Products = typename decltype(tag)::type;
    using T = typename Products::Element;
    using Acc = typename Products::Acc;
    if (dtype == acc_type(dtype)) {
      weight_gradient<Products>(s, segments, grad_top_k, input_top_k, false,
                                mutable_data<Acc>(out));
    } else {
      weight_gradient<Products>(s, segments, grad_top_k, input_top_k, false, mutable_data<T>(out));
    }
  });
  return out;
}

void grouped_wgrad_(at::Tensor& sum, at::TensorList grad, at::TensorList input,
                    at::TensorList order, at::TensorList offsets, int64_t grad_top_k,
                    int64_t input_top_k) {
  UNIPOOL_NVTX_RANGE("grouped_wgrad_");
  const auto s = check_grouped_wgrad(grad, input, order, offsets, grad_top_k, input_top_k);
  check_wgrad_sum(sum, s, grad, input, order, offsets);
  const WgradSegments segments(s, grad, input, order, offsets, grad_top_k);
  with_products(grad[0].scalar_type(), true, [&](auto tag) {
    using Products = typename decltype(tag)::type;
    weight_gradient<Products>(s, segments, grad_top_k, input_top_k, true,
                              mutable_data<typename Products::Acc>(sum));
  });
}

}  // namespace
}  // namespace unipool::cpu

TORCH_LIBRARY_IMPL(unipool, CPU, m) {
  m.impl("grouped_wgrad", &unipool::cpu::grouped_wgrad);
  m.impl("grouped_wgrad_", &unipool::cpu::grouped_wgrad_);
}
