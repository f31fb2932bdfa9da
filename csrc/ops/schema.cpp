// SPDX-License-Identifier: Apache-2.0
// Every op of UniPool. T tokens, k experts per token, M experts, N = T * k sorted rows, D model
// width, F expert width; a slot is token * k + j. "acc" is float32 (float64 for float64 inputs).
//
// Ties in a top-k go to the lower expert id, and NaN counts as the greatest score, on every
// backend. A slot whose id is outside [0, M) is dropped: it has no row (inverse -1) and adds
// nothing.
#include <torch/csrc/autograd/autograd_not_implemented_fallback.h>
#include <torch/library.h>

#include <string>

namespace {

// x [T, D] times weight [M, D] transposed: logits [T, M] in acc, the products of low-precision
// operands not rounded. grad [T, M] acc.
constexpr const char* kLogits[] = {
    "router_logits(Tensor x, Tensor weight) -> Tensor",
    "router_logits_bwd(Tensor grad, Tensor x, Tensor weight) "
    "-> (Tensor grad_x, Tensor grad_weight)",
};

// Logits [T, M] -> weights [T, k] acc, experts [T, k] i32, load [M] i32, importance [M] acc.
// bias [M] steers the choice only; mask [M] bool hides experts where it is true.
constexpr const char* kRouter[] = {
    "norm_topk(Tensor logits, Tensor scale, int top_k, float calibration, float eps, Tensor? bias, "
    "Tensor? mask) -> (Tensor weights, Tensor experts, Tensor load, Tensor importance)",
    "norm_topk_bwd(Tensor? grad_weights, Tensor? grad_importance, Tensor logits, Tensor scale, "
    "Tensor experts, float calibration, float eps, Tensor? mask) "
    "-> (Tensor grad_logits, Tensor grad_scale)",
    "softmax_topk(Tensor logits, int top_k, bool renormalize, Tensor? bias, Tensor? mask) "
    "-> (Tensor weights, Tensor experts, Tensor load, Tensor importance)",
    "softmax_topk_bwd(Tensor? grad_weights, Tensor? grad_importance, Tensor logits, "
    "Tensor experts, bool renormalize, Tensor? mask) -> Tensor",
};

// order [N] i32: slot of each sorted row, stable, -1 past offsets[M]; inverse [T, k] i32: its
// inverse, -1 for a dropped slot; offsets [M + 1] i32. Slots run through all layers in list order.
// permute and unpermute without weights are each other's backward.
constexpr const char* kDispatch[] = {
    "dispatch_plan(Tensor[] experts, int num_experts) "
    "-> (Tensor order, Tensor inverse, Tensor offsets)",
    "permute(Tensor x, Tensor order, int top_k) -> Tensor",
    "unpermute(Tensor y, Tensor inverse, Tensor? weights) -> Tensor",
    "unpermute_bwd(Tensor grad, Tensor y, Tensor order, Tensor inverse, Tensor weights) "
    "-> (Tensor grad_y, Tensor grad_weights)",
};

// a [N, K], b [M, n, K] -> [N, n]: the rows of expert e times b[e] transposed; rows past
// offsets[M] are zero. grouped_wgrad sums grad^T input over the rows of an expert in all segments
// (layers): out [M, n, K], in the dtype of grad or in acc; grouped_wgrad_ adds to an acc tensor and
// leaves experts without rows alone. An operand with top_k = 0 is in sorted rows already; otherwise
// row r is read from token order[r] / top_k.
// expert_mlp: preact [N, 2F] are the gate and up pre-activations in sorted rows (no rows unless
// kept); hidden [N, F] = weight * silu(gate) * up is the input of down_proj's weight gradient.
// expert_mlp_bwd_ writes grad_preact over preact.
constexpr const char* kExperts[] = {
    "grouped_mm(Tensor a, Tensor b, Tensor offsets) -> Tensor",
    "grouped_mm_bwd_a(Tensor grad, Tensor b, Tensor offsets) -> Tensor",
    "grouped_wgrad(Tensor[] grad, Tensor[] input, Tensor[] order, Tensor[] offsets, "
    "int grad_top_k, int input_top_k, ScalarType? out_dtype=None) -> Tensor",
    "grouped_wgrad_(Tensor(a!) sum, Tensor[] grad, Tensor[] input, Tensor[] order, "
    "Tensor[] offsets, int grad_top_k, int input_top_k) -> ()",
    "expert_mlp(Tensor x, Tensor weights, Tensor gate_up, Tensor down, Tensor order, "
    "Tensor inverse, Tensor offsets, bool keep_preact) -> (Tensor y, Tensor preact)",
    "expert_mlp_bwd(Tensor grad, Tensor weights, Tensor gate_up, Tensor down, Tensor order, "
    "Tensor inverse, Tensor offsets, Tensor preact) "
    "-> (Tensor grad_x, Tensor grad_weights, Tensor grad_preact, Tensor hidden)",
    "expert_mlp_bwd_(Tensor grad, Tensor weights, Tensor gate_up, Tensor down, Tensor order, "
    "Tensor inverse, Tensor offsets, Tensor(a!) preact) "
    "-> (Tensor grad_x, Tensor grad_weights, Tensor hidden)",
};

template <class Visit>
void for_each_schema(Visit visit) {
  for (const char* schema : kLogits) visit(schema);
  for (const char* schema : kRouter) visit(schema);
  for (const char* schema : kDispatch) visit(schema);
  for (const char* schema : kExperts) visit(schema);
}

}  // namespace

TORCH_LIBRARY(unipool, m) {
  for_each_schema([&](const char* schema) { m.def(schema, {at::Tag::pt2_compliant_tag}); });
}

// The autograd formulas are the torch.autograd.Functions in unipool/ops. A raw op called with
// inputs that require grad would lose the gradient without a word; this turns it into an error.
TORCH_LIBRARY_IMPL(unipool, Autograd, m) {
  for_each_schema([&](const char* schema) {
    const std::string text(schema);
    m.impl(text.substr(0, text.find('(')).c_str(),
           torch::autograd::autogradNotImplementedFallback());
  });
}
