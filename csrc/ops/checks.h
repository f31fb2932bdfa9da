// SPDX-License-Identifier: Apache-2.0
// Input checks and output allocation, shared by the CPU and CUDA implementations of each op: a
// backend file holds loops and launches only. check_<op> throws one line that names the op, the
// argument, what was expected and what came. Values of index tensors are not looked at here (a CUDA
// backend cannot without waiting for the device); the CPU backend checks them with
// check_<op>_values.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <vector>

namespace unipool {

using OptionalTensor = std::optional<at::Tensor>;

// float64 for float64 inputs, else float32: the type of sums and of the router's outputs.
at::ScalarType acc_type(at::ScalarType dtype);

// --- router_logits

struct LogitsShape {
  int64_t tokens;
  int64_t experts;
  int64_t width;                                                   // D
  double flops() const { return 2.0 * tokens * experts * width; }  // forward
};

LogitsShape check_router_logits(const at::Tensor& x, const at::Tensor& weight);
LogitsShape check_router_logits_bwd(const at::Tensor& grad, const at::Tensor& x,
                                    const at::Tensor& weight);
at::Tensor alloc_router_logits(const LogitsShape& shape, const at::Tensor& x);

// --- router

struct RouterShape {
  int64_t tokens;
  int64_t experts;
  int64_t top_k;
};

struct RouterOutputs {
  at::Tensor weights;     // [T, k] acc
  at::Tensor experts;     // [T, k] i32
  at::Tensor load;        // [M] i32
  at::Tensor importance;  // [M] acc
};

RouterShape check_norm_topk(const at::Tensor& logits, const at::Tensor& scale, int64_t top_k,
                            double calibration, double eps, const OptionalTensor& bias,
                            const OptionalTensor& mask);
RouterShape check_softmax_topk(const at::Tensor& logits, int64_t top_k, bool renormalize,
                               const OptionalTensor& bias, const OptionalTensor& mask);
RouterShape check_norm_topk_bwd(const OptionalTensor& grad_weights,
                                const OptionalTensor& grad_importance, const at::Tensor& logits,
                                const at::Tensor& scale, const at::Tensor& experts,
                                double calibration, double eps, const OptionalTensor& mask);
RouterShape check_softmax_topk_bwd(const OptionalTensor& grad_weights,
                                   const OptionalTensor& grad_importance, const at::Tensor& logits,
                                   const at::Tensor& experts, bool renormalize,
                                   const OptionalTensor& mask);
RouterOutputs alloc_router(const RouterShape& shape, const at::Tensor& logits);

at::Tensor alloc_grad_logits(const RouterShape& shape, const at::Tensor& logits);
at::Tensor alloc_grad_scale(const at::Tensor& scale);

// --- dispatch

struct PlanShape {
  int64_t tokens;  // of all layers
  int64_t top_k;
  int64_t experts;
  int64_t slots() const { return tokens * top_k; }
};

struct PlanOutputs {
  at::Tensor order;    // [N] i32
  at::Tensor inverse;  // [T, k] i32
  at::Tensor offsets;  // [M + 1] i32
};

PlanShape check_dispatch_plan(at::TensorList experts, int64_t num_experts);
PlanOutputs alloc_dispatch_plan(const PlanShape& shape, const at::Tensor& like);

struct PermuteShape {
  int64_t tokens;
  int64_t rows;  // N
  int64_t width;
  int64_t top_k;
};

PermuteShape check_permute(const at::Tensor& x, const at::Tensor& order, int64_t top_k);
PermuteShape check_unpermute(const at::Tensor& y, const at::Tensor& inverse,
                             const OptionalTensor& weights);
PermuteShape check_unpermute_bwd(const at::Tensor& grad, const at::Tensor& y,
                                 const at::Tensor& order, const at::Tensor& inverse,
                                 const at::Tensor& weights);

struct UnpermuteGrads {
  at::Tensor grad_y;        // [N, D]
  at::Tensor grad_weights;  // [T, k] acc
};

at::Tensor alloc_permute(const PermuteShape& shape, const at::Tensor& x);
at::Tensor alloc_unpermute(const PermuteShape& shape, const at::Tensor& y);
UnpermuteGrads alloc_unpermute_bwd(const PermuteShape& shape, const at::Tensor& y,
                                   const at::Tensor& weights);

// --- grouped_mm

struct GroupedShape {
  int64_t rows;  // N
  int64_t experts;
  int64_t n;
  int64_t k;
};

GroupedShape check_grouped_mm(const at::Tensor& a, const at::Tensor& b, const at::Tensor& offsets);
GroupedShape check_grouped_mm_bwd_a(const at::Tensor& grad, const at::Tensor& b,
                                    const at::Tensor& offsets);
at::Tensor alloc_grouped_mm(const GroupedShape& shape, const at::Tensor& a);
at::Tensor alloc_grouped_mm_bwd_a(const GroupedShape& shape, const at::Tensor& grad);

// --- grouped_wgrad

struct WgradShape {
  int64_t experts;
  int64_t n;
  int64_t k;
};

WgradShape check_grouped_wgrad(at::TensorList grad, at::TensorList input, at::TensorList order,
                               at::TensorList offsets, int64_t grad_top_k, int64_t input_top_k);
// The dtype of grouped_wgrad's result: out_dtype, which must be that of grad or its acc type.
at::ScalarType check_wgrad_dtype(at::TensorList grad, std::optional<at::ScalarType> out_dtype);
// The tensor that grouped_wgrad_ adds to: [M, n, K] acc, contiguous, in memory of its own.
void check_wgrad_sum(const at::Tensor& sum, const WgradShape& shape, at::TensorList grad,
                     at::TensorList input, at::TensorList order, at::TensorList offsets);
at::Tensor alloc_grouped_wgrad(const WgradShape& shape, at::TensorList grad, at::ScalarType dtype);

// --- expert_mlp

struct ExpertShape {
  int64_t tokens;
  int64_t top_k;
  int64_t experts;
  int64_t d_model;
  int64_t d_ff;
  int64_t rows() const { return tokens * top_k; }
  double flops() const { return 6.0 * rows() * d_model * d_ff; }  // forward; input gradients too
};

ExpertShape check_expert_mlp(const at::Tensor& x, const at::Tensor& weights,
                             const at::Tensor& gate_up, const at::Tensor& down,
                             const at::Tensor& order, const at::Tensor& inverse,
                             const at::Tensor& offsets);
ExpertShape check_expert_mlp_bwd(const at::Tensor& grad, const at::Tensor& weights,
                                 const at::Tensor& gate_up, const at::Tensor& down,
                                 const at::Tensor& order, const at::Tensor& inverse,
                                 const at::Tensor& offsets, const at::Tensor& preact);
// As above; preact, which is to be written, must be contiguous and in memory of its own.
ExpertShape check_expert_mlp_bwd_(const at::Tensor& grad, const at::Tensor& weights,
                                  const at::Tensor& gate_up, const at::Tensor& down,
                                  const at::Tensor& order, const at::Tensor& inverse,
                                  const at::Tensor& offsets, const at::Tensor& preact);

struct ExpertOutputs {
  at::Tensor y;       // [T, D]
  at::Tensor preact;  // [N, 2F], or [0, 2F] when not kept
};

struct ExpertGrads {
  at::Tensor grad_x;        // [T, D]
  at::Tensor grad_weights;  // [T, k] acc
  at::Tensor grad_preact;   // [N, 2F]
  at::Tensor hidden;        // [N, F]
};

ExpertOutputs alloc_expert_mlp(const ExpertShape& shape, const at::Tensor& x, bool keep_preact);
// grad_preact: where that gradient is to be written, if not to memory of its own.
ExpertGrads alloc_expert_mlp_bwd(const ExpertShape& shape, const at::Tensor& grad,
                                 const at::Tensor& weights,
                                 const OptionalTensor& grad_preact = std::nullopt);

// --- values of index tensors, for a backend that can read them

void check_offsets_values(const char* op, const at::Tensor& offsets, int64_t rows);
// In [-1, bound).
void check_index_values(const char* op, const char* name, const at::Tensor& index, int64_t bound);
// The slots of the first `valid` rows in [0, rows).
void check_order_values(const char* op, const at::Tensor& order, int64_t rows, int64_t valid);

}  // namespace unipool
