// SPDX-License-Identifier: Apache-2.0
// Tensor cores, and the loads and stores of their fragments.
#include <algorithm>

#include "ptx/addresses.h"
#include "ptx/numbers.h"
#include "ptx/opcode.h"

namespace ptx {
namespace {

void need_all_lanes(const Warp& w) {
  if (w.mask != ~0u) throw Error("not all 32 lanes are here");
}

// --- matrices of 8 rows of 16 bytes; lane l has the two elements from 2 * (l % 4) on of row l / 4

using Matrix = u16[8][8];

void rows(Warp& w, const Instruction& i, const Operand& address, int matrix, Access kind,
          char** p) {
  for (int row = 0; row < 8; ++row) {
    const int l = 8 * matrix + row;
    p[l] = pointer(w, i, address, l, 16);
    w.touch(l, p[l], 16, kind);
  }
}
template <bool kTranspose>
void to_lanes(const Matrix& m, u32* lanes) {
  for (int l = 0; l < kLanes; ++l) {
    const int g = l / 4, c = 2 * (l % 4);
    lanes[l] = kTranspose ? m[c][g] | u32(m[c + 1][g]) << 16 : m[g][c] | u32(m[g][c + 1]) << 16;
  }
}
template <bool kTranspose>
void to_matrix(const u32* lanes, Matrix& m) {
  for (int l = 0; l < kLanes; ++l) {
    const int g = l / 4, c = 2 * (l % 4);
    (kTranspose ? m[c][g] : m[g][c]) = u16(lanes[l]);
    (kTranspose ? m[c + 1][g] : m[g][c + 1]) = u16(lanes[l] >> 16);
  }
}
Mask lanes_of(int matrices) { return matrices == 4 ? ~0u : (1u << (8 * matrices)) - 1; }

template <bool kTranspose>
void ldmatrix(Warp& w, const Instruction& i) {
  need_all_lanes(w);
  u32 r[4][kLanes];
  char* p[kLanes];
  for (int j = 0; j < i.count; ++j) {
    rows(w, i, i.o[i.count], j, kRead, p);
    Matrix m;
    for (int row = 0; row < 8; ++row) memcpy(m[row], p[8 * j + row], 16);
    to_lanes<kTranspose>(m, r[j]);
  }
  for (int j = 0; j < i.count; ++j) memcpy(w.at<u32>(i.o[j]), r[j], sizeof r[j]);
  if (w.block->profile) count_request(w, i, lanes_of(i.count), p, 16, kRead);
}
template <bool kTranspose>
void stmatrix(Warp& w, const Instruction& i) {
  need_all_lanes(w);
  char* p[kLanes];
  for (int j = 0; j < i.count; ++j) {
    rows(w, i, i.o[0], j, kWrite, p);
    Matrix m;
    to_matrix<kTranspose>(w.at<u32>(i.o[1 + j]), m);
    for (int row = 0; row < 8; ++row) memcpy(p[8 * j + row], m[row], 16);
  }
  if (w.block->profile) count_request(w, i, lanes_of(i.count), p, 16, kWrite);
}
void movmatrix(Warp& w, const Instruction& i) {
  need_all_lanes(w);
  Matrix m;
  to_matrix<false>(w.at<u32>(i.o[1]), m);
  to_lanes<true>(m, w.at<u32>(i.o[0]));
}

// --- mma: D (16 x 8) = A (16 x depth) * B (depth x 8) + C, as the manual lays out its fragments

// The numbers in a register of A or B.
template <float (*kWiden)(u16)>
struct Halves {
  using Value = float;
  static constexpr int kCount = 2;
  static float get(u32 bits, int n) { return kWiden(u16(bits >> 16 * n)); }
};
struct TF32 {
  using Value = float;
  static constexpr int kCount = 1;
  static float get(u32 bits, int) {
    bits &= ~0x1fffu;  // the tensor core does not read the rest
    float f;
    memcpy(&f, &bits, 4);
    return f;
  }
};
template <class T>
struct Bytes {
  using Value = s32;
  static constexpr int kCount = 4;
  static s32 get(u32 bits, int n) { return T(bits >> 8 * n); }
};

template <class Element, int kDepth>
void mma(Warp& w, const Instruction& i) {
  using Value = typename Element::Value;
  constexpr int kIn = Element::kCount;
  constexpr int kSteps = kDepth / (4 * kIn);  // registers of B; A has twice as many
  need_all_lanes(w);
  Value a[16][kDepth], b[kDepth][8], d[16][8];
  const Operand *in_a = &i.o[4], *in_b = in_a + 2 * kSteps, *in_c = in_b + kSteps;
  for (int k = 0; k < kSteps; ++k) {
    const u32 *top = w.at<u32>(in_a[2 * k]), *low = w.at<u32>(in_a[2 * k + 1]);
    const u32* right = w.at<u32>(in_b[k]);
    for (int l = 0; l < kLanes; ++l) {
      const int g = l / 4, first = kIn * (4 * k + l % 4);
      for (int n = 0; n < kIn; ++n) {
        a[g][first + n] = Element::get(top[l], n);
        a[g + 8][first + n] = Element::get(low[l], n);
        b[first + n][g] = Element::get(right[l], n);
      }
    }
  }
  for (int j = 0; j < 4; ++j) {
    const Value* c = w.at<Value>(in_c[j]);
    for (int l = 0; l < kLanes; ++l) d[l / 4 + 8 * (j / 2)][2 * (l % 4) + j % 2] = c[l];
  }
  for (int m = 0; m < 16; ++m)
    for (int k = 0; k < kDepth; ++k)
      for (int n = 0; n < 8; ++n) d[m][n] += a[m][k] * b[k][n];
  for (int j = 0; j < 4; ++j) {
    Value* r = w.at<Value>(i.o[j]);
    for (int l = 0; l < kLanes; ++l) r[l] = d[l / 4 + 8 * (j / 2)][2 * (l % 4) + j % 2];
  }
}

Handler product(const Opcode& op, Instruction& i, std::string_view shape) {
  // type(): of C; then of B, A and D
  const std::string_view c = op.type(0), b = op.type(1), a = op.type(2), d = op.type(3);
  if (c != d) return nullptr;
  const bool k4 = shape == "m16n8k4", k8 = shape == "m16n8k8", k16 = shape == "m16n8k16";
  const bool k32 = shape == "m16n8k32";
  i.flops = 2 * 16 * 8 * (k4 ? 4 : k8 ? 8 : k16 ? 16 : 32);
  if (c == "f32" && a == b) {
    if (a == "bf16" && (k8 || k16))
      return k16 ? &mma<Halves<of_bf16>, 16> : &mma<Halves<of_bf16>, 8>;
    if (a == "f16" && (k8 || k16)) return k16 ? &mma<Halves<of_f16>, 16> : &mma<Halves<of_f16>, 8>;
    if (a == "tf32" && (k4 || k8)) return k8 ? &mma<TF32, 8> : &mma<TF32, 4>;
  }
  if (c == "s32" && a == b && (k16 || k32)) {
    if (a == "s8") return k32 ? &mma<Bytes<s8>, 32> : &mma<Bytes<s8>, 16>;
    if (a == "u8") return k32 ? &mma<Bytes<u8>, 32> : &mma<Bytes<u8>, 16>;
  }
  return nullptr;
}

}  // namespace

Handler tensor_core(const Opcode& op, Instruction& i) {
  const std::string& name = op.name();
  if (!op.has("sync") || !op.has("aligned")) return nullptr;
  i.members = kAllLive;
  if (name == "mma") {
    const std::string_view shape = op.one_of({"m16n8k4", "m16n8k8", "m16n8k16", "m16n8k32"});
    i.outputs = 4;
    return op.has("row") && op.has("col") ? product(op, i, shape) : nullptr;
  }
  const bool transpose = op.has("trans");
  if (!op.has("m8n8") || op.type() != "b16") return nullptr;
  if (name == "movmatrix") return transpose ? &movmatrix : nullptr;
  op.allow({"shared", "shared::cta"});
  i.space = Space::shared;
  const std::string_view count = op.one_of({"x1", "x2", "x4"});
  if (count.empty()) return nullptr;
  i.count = count[1] - '0';
  if (name == "ldmatrix") {
    i.outputs = uint8_t(i.count);
    return transpose ? &ldmatrix<true> : &ldmatrix<false>;
  }
  i.outputs = 0;
  return transpose ? &stmatrix<true> : &stmatrix<false>;
}

}  // namespace ptx
