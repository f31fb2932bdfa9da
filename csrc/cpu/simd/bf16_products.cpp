// SPDX-License-Identifier: Apache-2.0
// Compiled for AVX512-BF16 only; see CMakeLists.txt.
#include "cpu/simd/bf16_products.h"

#include <immintrin.h>

#include <type_traits>
#include <utility>

namespace unipool::cpu::avx512_bf16 {
namespace {

constexpr int64_t kVec = 32;        // bfloat16 values of a register
constexpr int64_t kHalf = 16;       // float32 values of a register
constexpr int kPanel = 12;          // rows of a register tile of nn and tn: 12 x 2 sums
constexpr int64_t kLine = 64;       // bytes
constexpr int64_t kDepth = 256;     // rows of w that nn takes at a time,
constexpr int64_t kWidth = 256;     // and columns: 128 KiB, in L2
constexpr int64_t kRowsAhead = 8;   // rows that tn fetches before it packs them
constexpr int64_t kNtDepth = 1024;  // k that nt takes at a time: 16 rows of w stay in L1

inline __mmask32 mask32(int64_t n) {
  return n >= kVec ? ~__mmask32(0) : static_cast<__mmask32>((uint32_t(1) << n) - 1);
}
inline __mmask16 mask16(int64_t n) {
  return n >= kHalf ? __mmask16(0xffff)
                    : static_cast<__mmask16>(n <= 0 ? 0 : (uint32_t(1) << n) - 1);
}
inline __m512i load(const bf16* p) { return _mm512_loadu_si512(p); }
inline __m512i load(const bf16* p, __mmask32 mask) { return _mm512_maskz_loadu_epi16(mask, p); }
inline __m512 dot(__m512 sum, __m512i a, __m512i b) {
  return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b);
}

// --- nt: both operands lie along k, so a register holds 32 k of one row; sums over its lanes come
// last.

// Lane 4 i + j of the result: the sum of lanes 4 i .. 4 i + 3 of a_j.
inline __m512 sum_quads(__m512 a0, __m512 a1, __m512 a2, __m512 a3) {
  const __m512d low =
      _mm512_castps_pd(_mm512_add_ps(_mm512_unpacklo_ps(a0, a1), _mm512_unpackhi_ps(a0, a1)));
  const __m512d high =
      _mm512_castps_pd(_mm512_add_ps(_mm512_unpacklo_ps(a2, a3), _mm512_unpackhi_ps(a2, a3)));
  return _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(low, high)),
                       _mm512_castpd_ps(_mm512_unpackhi_pd(low, high)));
}

// Lane 4 i + j: the sum over q of lane 4 q + j of u_i.
inline __m512 sum_across(const __m512 (&u)[4]) {
  const __m512 a =
      _mm512_add_ps(_mm512_shuffle_f32x4(u[0], u[1], 0x44), _mm512_shuffle_f32x4(u[0], u[1], 0xee));
  const __m512 b =
      _mm512_add_ps(_mm512_shuffle_f32x4(u[2], u[3], 0x44), _mm512_shuffle_f32x4(u[2], u[3], 0xee));
  return _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xdd));
}

// c [kRows, 16] (+)= x [kRows, k] w [16, k]^T, of which `mask` columns are stored; w_row(i) is row
// i of w. The sums of a step are 16 (kRows 1: 16 rows of w, 2: 8, 3 and 4: 4).
// Rows kFetch * part .. kFetch * part + kFetch - 1 of every four are fetched `ahead` bytes on.
template <int kRows, int kFetch, class WRow>
inline void nt_tile(int64_t k, const bf16* x, int64_t ldx, WRow w_row, float* c, int64_t ldc,
                    __mmask16 mask, bool add, int64_t ahead, int part) {
  constexpr int kStep = kRows == 1 ? 16 : kRows == 2 ? 8 : 4;
  __m512 quads[kRows][4];
#pragma GCC unroll 4
  for (int first = 0; first < 16; first += kStep) {
    __m512 sum[kStep][kRows];
#pragma GCC unroll 16
    for (int i = 0; i < kStep; ++i) {
#pragma GCC unroll 4
      for (int r = 0; r < kRows; ++r) sum[i][r] = _mm512_setzero_ps();
    }
    const bf16* w[kStep];
    for (int i = 0; i < kStep; ++i) w[i] = w_row(first + i);
    const auto step = [&](int64_t at, auto load_at) {
      __m512i xs[kRows];
#pragma GCC unroll 4
      for (int r = 0; r < kRows; ++r) xs[r] = load_at(x + r * ldx + at);
#pragma GCC unroll 16
      for (int i = 0; i < kStep; ++i) {
        const __m512i ws = load_at(w[i] + at);
#pragma GCC unroll 4
        for (int r = 0; r < kRows; ++r) sum[i][r] = dot(sum[i][r], ws, xs[r]);
      }
    };
    int64_t at = 0;
    for (; at + kVec <= k; at += kVec) {
      if constexpr (kFetch > 0) {
        for (int i = 0; i < kStep; i += 4) {
          for (int f = 0; f < kFetch; ++f) {
            _mm_prefetch(reinterpret_cast<const char*>(w[i + kFetch * part + f] + at) + ahead,
                         _MM_HINT_T1);
          }
        }
      }
      step(at, [](const bf16* p) { return load(p); });
    }
    if (at < k) step(at, [m = mask32(k - at)](const bf16* p) { return load(p, m); });
#pragma GCC unroll 4
    for (int i = 0; i < kStep; i += 4) {
#pragma GCC unroll 4
      for (int r = 0; r < kRows; ++r) {
        quads[r][(first + i) / 4] =
            sum_quads(sum[i][r], sum[i + 1][r], sum[i + 2][r], sum[i + 3][r]);
      }
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r) {
    __m512 v = sum_across(quads[r]);
    if (add) v = _mm512_add_ps(v, _mm512_maskz_loadu_ps(mask, c + r * ldc));
    _mm512_mask_storeu_ps(c + r * ldc, mask, v);
  }
}

// c [rows, 16] (+)= x w^T. The rows of w that come next are fetched meanwhile, spread over the
// first tiles: a burst would wait for the memory.
template <class WRow>
void nt_rows(int64_t rows, int64_t k, const bf16* x, int64_t ldx, WRow w_row, float* c, int64_t ldc,
             __mmask16 mask, bool add, int64_t ahead) {
  const int64_t tiles = (rows + 3) / 4;
  const int parts = tiles >= 4 ? 4 : tiles >= 2 ? 2 : 1;
  for (int64_t r = 0; r < rows; r += 4) {
    const int part = static_cast<int>(r / 4);
    const auto tile = [&]<int kRows>() {
      const auto call = [&]<int kFetch>() {
        nt_tile<kRows, kFetch>(k, x + r * ldx, ldx, w_row, c + r * ldc, ldc, mask, add, ahead,
                               part);
      };
      if (part >= parts) {
        call.template operator()<0>();
      } else if (parts == 4) {
        call.template operator()<1>();
      } else if (parts == 2) {
        call.template operator()<2>();
      } else {
        call.template operator()<4>();
      }
    };
    switch (rows - r) {
      case 1:
        tile.template operator()<1>();
        break;
      case 2:
        tile.template operator()<2>();
        break;
      case 3:
        tile.template operator()<3>();
        break;
      default:
        tile.template operator()<4>();
    }
  }
}

void nt(int64_t rows, int64_t n, int64_t k, const bf16* x, int64_t ldx, const bf16* w, int64_t ldw,
        float* c, int64_t ldc) {
  for (int64_t j = 0; j < n; j += kHalf) {
    const int64_t last = n - 1 - j;  // a row of w that is not there is read as the last one
    const int64_t ahead = kHalf * ldw * int64_t(sizeof(bf16));  // the same place 16 rows on
    for (int64_t at = 0; at == 0 || at < k; at += kNtDepth) {
      const int64_t depth = k - at < kNtDepth ? k - at : kNtDepth;
      const auto w_row = [&](int64_t i) { return w + (j + (i < last ? i : last)) * ldw + at; };
      nt_rows(rows, depth, x + at, ldx, w_row, c + j, ldc, mask16(n - j), at > 0, ahead);
    }
  }
}

// --- nn and tn: a register holds 16 columns of two consecutive k (a pair of rows of w, or of x in
// the weight gradient), which one value pair of the other operand is multiplied with.

// Two rows of 32 columns as pairs; the columns come in an order that `columns` undoes.
struct Pairs {
  __m512i a, b;
};
inline Pairs interleave(__m512i even, __m512i odd) {
  return {_mm512_unpacklo_epi16(even, odd), _mm512_unpackhi_epi16(even, odd)};
}
struct Columns {
  __m512 low, high;  // columns 0 .. 15 and 16 .. 31
};
inline Columns columns(__m512 a, __m512 b) {
  const __m512i low = _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
  const __m512i high =
      _mm512_setr_epi32(8, 9, 10, 11, 24, 25, 26, 27, 12, 13, 14, 15, 28, 29, 30, 31);
  return {_mm512_permutex2var_ps(a, low, b), _mm512_permutex2var_ps(a, high, b)};
}

// The operand with 32 columns: rows as they lie, interleaved on the way, or packed as pairs.
struct PlainColumns {
  const bf16* data;
  int64_t ld;
  __mmask32 mask;

  Pairs next() {
    const bf16* odd = data + ld;
    const Pairs pairs = interleave(load(data, mask), load(odd, mask));
    data = odd + ld;
    return pairs;
  }
  Pairs last() const { return interleave(load(data, mask), _mm512_setzero_si512()); }
};
struct PackedColumns {
  const bf16* data;

  Pairs next() {
    const Pairs pairs{load(data), load(data + kVec)};
    data += 2 * kVec;
    return pairs;
  }
};

// The other operand: the pair (row, k) is at data + row * row_step + k / 2 * pair_step.
struct PairRows {
  const bf16* data;
  int64_t row_step;
  int64_t pair_step;
};

// Lines of memory to fetch while other work is done: the first one, the distance to the next, and
// how many a step. Spread over the work, as a burst would wait for the memory.
struct Ahead {
  const char* at = nullptr;
  int64_t step = 0;
  int lines = 0;

  Ahead from_line(int64_t line) const { return {at + line * step, step, lines}; }
  void fetch() {
    for (int i = 0; i < lines; ++i, at += step) _mm_prefetch(at, _MM_HINT_T1);
  }
};

// Sums of kRows x 32 columns over k.
template <int kRows, class B, class Store>
inline void panel(int64_t k, PairRows a, B b, Ahead ahead, Store store) {
  __m512 sum[kRows][2];
#pragma GCC unroll 12
  for (int r = 0; r < kRows; ++r) sum[r][0] = sum[r][1] = _mm512_setzero_ps();
  for (int64_t p = 0; p < k / 2; ++p) {
    ahead.fetch();
    const Pairs w = b.next();
#pragma GCC unroll 12
    for (int r = 0; r < kRows; ++r) {
      int32_t pair;
      __builtin_memcpy(&pair, a.data + r * a.row_step, sizeof pair);
      const __m512i x = _mm512_set1_epi32(pair);
      sum[r][0] = dot(sum[r][0], x, w.a);
      sum[r][1] = dot(sum[r][1], x, w.b);
    }
    a.data += a.pair_step;
  }
  if constexpr (std::is_same_v<B, PlainColumns>) {
    if (k % 2 != 0) {
      const Pairs w = b.last();
      for (int r = 0; r < kRows; ++r) {
        const __m512i x = _mm512_set1_epi32(a.data[r * a.row_step].bits);
        sum[r][0] = dot(sum[r][0], x, w.a);
        sum[r][1] = dot(sum[r][1], x, w.b);
      }
    }
  }
#pragma GCC unroll 12
  for (int r = 0; r < kRows; ++r) store(r, columns(sum[r][0], sum[r][1]));
}

// The same for 1 to kPanel rows.
template <class B, class Store>
inline void panel_rows(int64_t rows, int64_t k, PairRows a, B b, Ahead ahead, Store store) {
  const auto call = [&]<int... kRows>(std::integer_sequence<int, kRows...>) {
    ((rows == kRows + 1 ? panel<kRows + 1>(k, a, b, ahead, store) : void()), ...);
  };
  call(std::make_integer_sequence<int, kPanel>());
}

// Stores to rows of float32, added to what is there if `add`.
struct FloatRows {
  float* out;
  int64_t ld;
  bool add;
  __mmask16 low, high;

  void operator()(int r, Columns v) const {
    float* row = out + r * ld;
    if (add) {
      v.low = _mm512_add_ps(v.low, _mm512_maskz_loadu_ps(low, row));
      v.high = _mm512_add_ps(v.high, _mm512_maskz_loadu_ps(high, row + kHalf));
    }
    _mm512_mask_storeu_ps(row, low, v.low);
    _mm512_mask_storeu_ps(row + kHalf, high, v.high);
  }
};

// Stores to rows of bfloat16. They will not be read soon: whole lines go past the caches.
struct Bf16Rows {
  bf16* out;
  int64_t ld;
  __mmask32 mask;

  void operator()(int r, Columns v) const {
    bf16* row = out + r * ld;
    const auto value = (__m512i)_mm512_cvtne2ps_pbh(v.high, v.low);
    if (mask == ~__mmask32(0) && reinterpret_cast<uintptr_t>(row) % kLine == 0) {
      _mm512_stream_si512(reinterpret_cast<__m512i*>(row), value);
    } else {
      _mm512_mask_storeu_epi16(row, mask, value);
    }
  }
};

// Equal parts of at most kPanel rows: f(first, count).
template <class F>
inline void for_panels(int64_t rows, F f) {
  const int64_t parts = (rows + kPanel - 1) / kPanel;
  for (int64_t part = 0, first = 0; part < parts; ++part) {
    const int64_t count = (rows - first + parts - part - 1) / (parts - part);
    f(first, count);
    first += count;
  }
}

void nn(int64_t rows, int64_t n, int64_t k, const bf16* x, int64_t ldx, const bf16* w, int64_t ldw,
        float* c, int64_t ldc) {
  for (int64_t j0 = 0; j0 < n; j0 += kWidth) {
    const int64_t width = n - j0 < kWidth ? n - j0 : kWidth;
    for (int64_t at = 0; at == 0 || at < k; at += kDepth) {
      const int64_t depth = k - at < kDepth ? k - at : kDepth;
      const bf16* block = w + at * ldw + j0;
      // The block below, or the next to the right; past the last one it is the next expert's.
      const bf16* next = at + depth < k   ? block + depth * ldw
                         : j0 + width < n ? w + j0 + width
                                          : w + k * ldw;
      for (int64_t j = 0; j < width; j += kVec) {
        // A strip of the next block, a row per line, in the first two panels.
        Ahead ahead{reinterpret_cast<const char*>(next + j), ldw * int64_t(sizeof(bf16)),
                    rows > kPanel ? 1 : 2};
        for_panels(rows, [&](int64_t first, int64_t count) {
          panel_rows(count, depth, {x + first * ldx + at, ldx, 2},
                     PlainColumns{block + j, ldw, mask32(width - j)}, ahead,
                     FloatRows{c + first * ldc + j0 + j, ldc, at > 0, mask16(width - j),
                               mask16(width - j - kHalf)});
          ahead = first == 0 ? ahead.from_line(depth / 2) : Ahead{};
        });
      }
    }
  }
}

// --- tn

// Padding keeps the pairs of a column of g out of one another's cache sets.
inline int64_t grad_ld(int64_t n) { return (n + kHalf - 1) / kHalf * kHalf + kHalf; }
inline int64_t padded(int64_t k) { return (k + kVec - 1) / kVec * kVec; }

int64_t tn_scratch(int64_t count, int64_t n, int64_t k) {
  return (count + 1) / 2 * 2 * (grad_ld(n) + padded(k));
}

// The rows of an operand lie apart, so nothing else brings them in time.
inline void fetch_rows(int64_t count, int64_t n, const bf16* const* rows, int64_t next) {
  constexpr int64_t kLineElements = kLine / int64_t(sizeof(bf16));
  for (int64_t r = next; r < next + 2 && r < count; ++r) {
    for (int64_t j = 0; j < n; j += kLineElements) {
      _mm_prefetch(reinterpret_cast<const char*>(rows[r] + j), _MM_HINT_T0);
    }
  }
}

// g -> pairs of rows [count / 2][n] in column order.
void pack_grads(int64_t count, int64_t n, const bf16* const* g, bf16* out) {
  const int64_t ld = 2 * grad_ld(n);
  const __m512i zero = _mm512_setzero_si512();
  for (int64_t r = 0; r < count; r += 2, out += ld) {
    fetch_rows(count, n, g, r + kRowsAhead);
    for (int64_t j = 0; j < n; j += kHalf) {
      const auto mask = mask16(n - j);
      const __m256i even = _mm256_maskz_loadu_epi16(mask, g[r] + j);
      const __m256i odd = r + 1 < count ? _mm256_maskz_loadu_epi16(mask, g[r + 1] + j)
                                        : _mm512_castsi512_si256(zero);
      const __m512i pairs = _mm512_or_si512(_mm512_cvtepu16_epi32(even),
                                            _mm512_slli_epi32(_mm512_cvtepu16_epi32(odd), 16));
      _mm512_storeu_si512(out + 2 * j, pairs);
    }
  }
}

// x -> strips of 32 columns of pairs of rows.
void pack_inputs(int64_t count, int64_t k, const bf16* const* x, bf16* out) {
  const int64_t strip = (count + 1) / 2 * 2 * kVec;
  for (int64_t r = 0; r < count; r += 2) {
    fetch_rows(count, k, x, r + kRowsAhead);
    for (int64_t j = 0; j < k; j += kVec) {
      const __mmask32 mask = mask32(k - j);
      const __m512i odd = r + 1 < count ? load(x[r + 1] + j, mask) : _mm512_setzero_si512();
      const Pairs pairs = interleave(load(x[r] + j, mask), odd);
      bf16* to = out + j / kVec * strip + r * kVec;
      _mm512_storeu_si512(to, pairs.a);
      _mm512_storeu_si512(to + kVec, pairs.b);
    }
  }
}

// make_store(first, j): where the panel of rows from `first` and columns from j goes
template <class MakeStore>
void tn_panels(int64_t count, int64_t n, int64_t k, const bf16* const* g, const bf16* const* x,
               bf16* scratch, MakeStore make_store) {
  const int64_t pairs = (count + 1) / 2;
  bf16* grads = scratch + pairs * 2 * padded(k);
  pack_inputs(count, k, x, scratch);
  pack_grads(count, n, g, grads);
  for_panels(n, [&](int64_t first, int64_t rows) {
    for (int64_t j = 0; j < k; j += kVec) {
      panel_rows(rows, 2 * pairs, {grads + 2 * first, 2, 2 * grad_ld(n)},
                 PackedColumns{scratch + j / kVec * pairs * 2 * kVec}, {}, make_store(first, j));
    }
  });
}

void tn(int64_t count, int64_t n, int64_t k, const bf16* const* g, const bf16* const* x,
        bf16* scratch, float* out, int64_t ldo, bool add) {
  tn_panels(count, n, k, g, x, scratch, [&](int64_t first, int64_t j) {
    return FloatRows{out + first * ldo + j, ldo, add, mask16(k - j), mask16(k - j - kHalf)};
  });
}

void tn_round(int64_t count, int64_t n, int64_t k, const bf16* const* g, const bf16* const* x,
              bf16* scratch, bf16* out, int64_t ldo) {
  tn_panels(count, n, k, g, x, scratch, [&](int64_t first, int64_t j) {
    return Bf16Rows{out + first * ldo + j, ldo, mask32(k - j)};
  });
  _mm_sfence();
}

}  // namespace

const Bf16Products& products() {
  static const Bf16Products table{nt, nn, tn, tn_round, tn_scratch};
  return table;
}

}  // namespace unipool::cpu::avx512_bf16
