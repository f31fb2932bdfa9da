// SPDX-License-Identifier: Apache-2.0
// How a stage comes into shared memory: a Loader<Operand, Lines, kVector> copies one operand tile
// per call, the next one along K each time. `Lines` says where the thread's lines are:
//   StridedLines   line() + i * kStep at a fixed distance: a weight matrix, either major
//   GatheredLines  K-major rows, each at its own address: rows found through `order`
//   TableLines     MN-major, line k at the address in row k of a table: the weight gradient
// kVector: 16-byte cp.async, zero-filled where there is nothing; wants every line to start at a
// multiple of 16 bytes and to be a multiple of 16 bytes long. Otherwise (any sizes and addresses)
// element by element through registers, at the same points of the pipeline.
#pragma once
#include "cuda/device/gemm/tile.cuh"

namespace unipool {

// One chunk, of which `valid` elements (none if <= 0) exist; zeros in place of the others.
template <bool kVector, class T>
__device__ __forceinline__ void copy_chunk(T* to, const T* from, int valid) {
  if constexpr (kVector) {
    using Chunk = cute::uint128_t;
    cute::SM80_CP_ASYNC_CACHEGLOBAL_ZFILL<Chunk>::copy(*reinterpret_cast<const Chunk*>(from),
                                                       *reinterpret_cast<Chunk*>(to), valid > 0);
  } else {
    constexpr int kChunk = kVectorBytes / int(sizeof(T));
    alignas(kVectorBytes) T chunk[kChunk];
#pragma unroll
    for (int i = 0; i < kChunk; ++i) chunk[i] = i < valid ? __ldg(from + i) : T(0.f);
    *reinterpret_cast<uint4*>(to) = *reinterpret_cast<const uint4*>(chunk);
  }
}

// --- where lines are

template <class Operand>
struct StridedLines {
  using T = typename Operand::T;
  const T* first;   // this thread's chunk of its line 0
  int64_t step;     // elements from one of its lines to the next
  int64_t advance;  // elements from one k tile to the next

  // A matrix whose lines, `stride` elements apart, begin with line 0 and column 0 of the tile.
  __device__ __forceinline__ static StridedLines matrix(const T* tile, int64_t stride) {
    return {tile + Operand::line() * stride + Operand::column(), Operand::kStep * stride,
            Operand::kMajor == Major::kK ? int64_t(Operand::kDepth) : Operand::kDepth * stride};
  }
  __device__ __forceinline__ const T* operator[](int i) const { return first + i * step; }
  __device__ __forceinline__ void next() { first += advance; }
};

template <class Operand>
struct GatheredLines {
  using T = typename Operand::T;
  static_assert(Operand::kMajor == Major::kK);
  const T* chunk[Operand::kCount];

  // row_of(r): the address of row r of the tile; asked for r < rows only.
  template <class RowOf>
  __device__ __forceinline__ GatheredLines(int rows, const RowOf& row_of) {
#pragma unroll
    for (int i = 0; i < Operand::kCount; ++i) {
      const int row = Operand::line() + i * Operand::kStep;
      chunk[i] = row < rows ? row_of(row) + Operand::column() : nullptr;
    }
  }
  __device__ __forceinline__ const T* operator[](int i) const { return chunk[i]; }
  __device__ __forceinline__ void next() {
#pragma unroll
    for (int i = 0; i < Operand::kCount; ++i) chunk[i] += Operand::kDepth;
  }
};

// kAhead: the addresses of the next tile are read while the tensor cores work on this one; else
// each when it is needed, for which fewer registers do.
template <class Operand, bool kAhead>
struct TableLines {
  using T = typename Operand::T;
  static_assert(Operand::kMajor == Major::kMn);
  const T* const* table;  // this thread's line 0 of the tile to come
  int64_t stride;         // of the table, in addresses
  int left;               // lines from there on
  int64_t column;         // added to every address
  const T* chunk[kAhead ? Operand::kCount : 1];

  // Line k of the tile is at table[k * stride] + first_column; k < lines.
  __device__ __forceinline__ TableLines(const T* const* table_, int64_t stride_, int lines,
                                        int64_t first_column)
      : table(table_ + Operand::line() * stride_),
        stride(stride_),
        left(lines - Operand::line()),
        column(first_column + Operand::column()) {
    fetch();
  }
  __device__ __forceinline__ const T* operator[](int i) const {
    if constexpr (kAhead) return chunk[i];
    return line_at(i);
  }
  __device__ __forceinline__ void next() {
    table += Operand::kDepth * stride;
    left -= Operand::kDepth;
    fetch();
  }

 private:
  __device__ __forceinline__ const T* line_at(int i) const {
    const int line = i * Operand::kStep;
    return line < left ? table[line * stride] + column : nullptr;
  }
  __device__ __forceinline__ void fetch() {
    if constexpr (kAhead) {
#pragma unroll
      for (int i = 0; i < Operand::kCount; ++i) chunk[i] = line_at(i);
    }
  }
};

// --- the copies

template <class Operand, class Lines, bool kVector>
class Loader {
  using T = typename Operand::T;
  static constexpr bool kLinesAlongK = Operand::kMajor == Major::kMn;

 public:
  // smem: stage 0 of the operand. lines_at: for the first k tile. lines and contiguous: how many
  // lines, and elements of a line, there are from the tile's first on, whether or not they are in
  // the tile; what lies beyond them is zeros.
  __device__ __forceinline__ Loader(T* smem, const Lines& lines_at, int lines, int contiguous)
      : Loader(smem, lines_at, lines - Operand::line(), Operand::kStep, contiguous) {}

  // Lines that the tile takes in another order (K-major): of this thread's there are those with
  // i * line_step < lines.
  __device__ __forceinline__ Loader(T* smem, const Lines& lines_at, int lines, int line_step,
                                    int contiguous)
      : lines_at_(lines_at),
        to_(smem + Operand::offset(Operand::line(), Operand::column())),
        lines_(kLinesAlongK ? lines : ceil_div(lines, line_step)),
        contiguous_(contiguous - Operand::column()) {}

  // Brings the next k tile. To be called for the tiles that exist only.
  __device__ __forceinline__ void load(int stage) {
    T* to = to_ + stage * Operand::kStageElements;
#pragma unroll
    for (int i = 0; i < Operand::kCount; ++i) {
      const bool exists = (kLinesAlongK ? i * Operand::kStep : i) < lines_;
      copy_chunk<kVector>(to + Operand::step_offset(i), lines_at_[i], exists ? contiguous_ : 0);
    }
    lines_at_.next();
    (kLinesAlongK ? lines_ : contiguous_) -= Operand::kDepth;
  }

 private:
  Lines lines_at_;
  T* to_;
  int lines_;       // that exist, in units of kStep if the thread's lines do not run along K
  int contiguous_;  // elements that exist, from this thread's chunk on
};

}  // namespace unipool
