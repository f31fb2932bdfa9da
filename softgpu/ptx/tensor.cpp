// SPDX-License-Identifier: Apache-2.0
// Tensor cores, and the loads and stores of their fragments.
#include <immintrin.h>

#include "ptx/addresses.h"
#include "ptx/opcode.h"

namespace ptx {
namespace {

void need_all_lanes(const Warp& w) {
  if (w.mask != ~0u) throw Error("not all 32 lanes are here");
}

// --- matrices of 8 rows of 16 bytes; lane l has the two elements from 2 * (l % 4) on of row l / 4,
// so that the lanes' words in a row are the matrix

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
  if constexpr (!kTranspose) {
    memcpy(lanes, m, sizeof m);
    return;
  }
  for (int l = 0; l < kLanes; ++l) {
    const int g = l / 4, c = 2 * (l % 4);
    lanes[l] = m[c][g] | u32(m[c + 1][g]) << 16;
  }
}
template <bool kTranspose>
void to_matrix(const u32* lanes, Matrix& m) {
  if constexpr (!kTranspose) {
    memcpy(m, lanes, sizeof m);
    return;
  }
  for (int l = 0; l < kLanes; ++l) {
    const int g = l / 4, c = 2 * (l % 4);
    m[c][g] = u16(lanes[l]);
    m[c + 1][g] = u16(lanes[l] >> 16);
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

// A register of A or B: each lane has kCount elements, all lanes together 32 * kCount in a row. The
// four lanes of a group have a part of a row of A, or of a column of B.
struct BF16 {
  using Value = float;
  static constexpr int kCount = 2;
  static void widen(const u32* lanes, float* out) {
    for (int l = 0; l < kLanes; l += 4) {
      const auto halves = _mm_load_si128(reinterpret_cast<const __m128i*>(lanes + l));
      const auto words = _mm256_slli_epi32(_mm256_cvtepu16_epi32(halves), 16);
      _mm256_storeu_ps(out + 2 * l, _mm256_castsi256_ps(words));
    }
  }
};
struct F16 {
  using Value = float;
  static constexpr int kCount = 2;
  static void widen(const u32* lanes, float* out) {
    for (int l = 0; l < kLanes; l += 4) {
      const auto halves = _mm_load_si128(reinterpret_cast<const __m128i*>(lanes + l));
      _mm256_storeu_ps(out + 2 * l, _mm256_cvtph_ps(halves));
    }
  }
};
struct TF32 {
  using Value = float;
  static constexpr int kCount = 1;
  static void widen(const u32* lanes, float* out) {
    for (int l = 0; l < kLanes; ++l) {
      const u32 bits = lanes[l] & ~0x1fffu;  // the tensor core does not read the rest
      memcpy(out + l, &bits, 4);
    }
  }
};
template <class T>
struct Bytes {
  using Value = s32;
  static constexpr int kCount = 4;
  static void widen(const u32* lanes, s32* out) {
    const auto* bytes = reinterpret_cast<const T*>(lanes);
    for (int n = 0; n < 4 * kLanes; ++n) out[n] = bytes[n];
  }
};

typedef float FloatRow __attribute__((vector_size(32)));  // of D
typedef s32 IntegerRow __attribute__((vector_size(32)));

template <class Element, int kDepth>
void mma(Warp& w, const Instruction& i) {
  using Value = typename Element::Value;
  constexpr int kPart = 4 * Element::kCount;  // of the depth, in one register
  constexpr int kSteps = kDepth / kPart;      // registers of B; A has twice as many
  using Row = std::conditional_t<std::is_same_v<Value, float>, FloatRow, IntegerRow>;
  need_all_lanes(w);
  Row d[16];
  const Operand *in_a = &i.o[4], *in_b = in_a + 2 * kSteps, *in_c = in_b + kSteps;
  for (int j = 0; j < 4; ++j) {
    const Value* c = w.at<Value>(in_c[j]);
    for (int l = 0; l < kLanes; ++l) d[l / 4 + 8 * (j / 2)][2 * (l % 4) + j % 2] = c[l];
  }
  for (int step = 0; step < kSteps; ++step) {
    Value a[16][kPart], columns[8][kPart];
    Row b[kPart];
    Element::widen(w.at<u32>(in_a[2 * step]), a[0]);
    Element::widen(w.at<u32>(in_a[2 * step + 1]), a[8]);
    Element::widen(w.at<u32>(in_b[step]), columns[0]);
    for (int n = 0; n < 8; ++n)
      for (int k = 0; k < kPart; ++k) b[k][n] = columns[n][k];
    for (int k = 0; k < kPart; ++k)
      for (int m = 0; m < 16; ++m) d[m] += a[m][k] * b[k];
  }
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
    if (a == "bf16" && (k8 || k16)) return k16 ? &mma<BF16, 16> : &mma<BF16, 8>;
    if (a == "f16" && (k8 || k16)) return k16 ? &mma<F16, 16> : &mma<F16, 8>;
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
