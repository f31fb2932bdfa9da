// SPDX-License-Identifier: Apache-2.0
// What a tile of a product is made of: C [kM, kN] += A [kM, kK] B [kN, kK]^T, one block at a time.
//
// How a kernel is put together (grouped_mm.cu is the plainest example):
//   using Tile = GemmTileOf<T, kTile, MajorA, MajorB>   this header: shapes, layouts, tensor cores
//   RowSchedule<Tile> schedule(...)                     schedule.cuh: which tiles this block does
//   while (schedule.next(tile)) {
//     Loader<Tile::A, ...> a(...); Loader<Tile::B, ...> b(...);   loaders.cuh: global -> shared
//     auto acc = Tile::zeros();
//     multiply<Tile>(smem, a, b, k_tiles, acc);         mainloop.cuh: shared -> registers -> acc
//     for_each_pair<Tile>(acc, ...); OutputTile<...>::store(...)  epilogue.cuh: acc -> global
//   }
// `smem` is Tile::kPipelineBytes of dynamic shared memory, aligned to 128 bytes, that mainloop and
// epilogue use in turn.
//
// Which accumulators a thread holds: mode 0 of acc is one MMA atom, mode 1 steps over rows, mode 2
// over columns, and for every j, acc(v, m, 2j) and acc(v, m, 2j + 1) are the same row and exactly 8
// columns apart: columns c and c + 8 with c % 16 < 8. A B operand whose rows alternate between two
// matrices in groups of 8 therefore gives a thread both products of a column.
#pragma once
#include <cute/tensor.hpp>

#include "cuda/device/kernel.cuh"
#include "unipool/gemm_tiles.h"
#include "unipool/types.h"

namespace unipool {

// The dimension in which an operand is contiguous: K, or M (of A) and N (of B).
enum class Major { kK, kMn };

// --- one operand in shared memory

// The smallest block of a swizzled layout. Rows (lines of contiguous elements) of 128 bytes hold 8
// chunks of 16 bytes, permuted by the row's number modulo 8: ldmatrix reads one chunk column of 8
// rows without a bank conflict. Of rows of 64 bytes, two share the banks and the upper bits of the
// row's number permute.
template <int kLine, int kChunk>
struct SwizzleOf {
  static constexpr int kLog = kChunk == 8 ? 3 : 2;  // elements of a chunk, as a power of two
  static_assert(kLine == 8 * kChunk || kLine == 4 * kChunk);
  using type = cute::Swizzle<kLine == 8 * kChunk ? 3 : 2, kLog, 3>;
};

// An operand tile of kMn x kDepth elements in each of kStages stages, filled 16 bytes ("a chunk")
// per thread at a time. Lines run along the contiguous dimension; a thread owns one chunk column
// and the lines line() + i * kStep, i < kCount, so everything but i * kStepElements is fixed for
// it.
template <class T_, int kMn_, int kDepth_, int kStages_, int kThreads, Major kMajor_>
struct Operand {
  using T = T_;
  static constexpr int kMn = kMn_, kDepth = kDepth_, kStages = kStages_;
  static constexpr Major kMajor = kMajor_;
  static constexpr int kChunk = kVectorBytes / int(sizeof(T));
  static constexpr int kContiguous = kMajor == Major::kK ? kDepth : kMn;
  static constexpr int kLines = kMajor == Major::kK ? kMn : kDepth;
  static constexpr int kChunks = kContiguous / kChunk;  // of a line
  static constexpr int kStep = kThreads / kChunks;
  static constexpr int kCount = kLines / kStep;
  static constexpr int kStageElements = kMn * kDepth;
  static_assert(kThreads % kChunks == 0 && kLines % kStep == 0 && kStep % 8 == 0);

  static constexpr int kAtomLine = kContiguous < 8 * kChunk ? kContiguous : 8 * kChunk;
  using Swizzle = typename SwizzleOf<kAtomLine, kChunk>::type;
  using Line = cute::Int<kAtomLine>;
  using Atom = std::conditional_t<
      kMajor == Major::kK,
      decltype(cute::composition(
          Swizzle{}, cute::Layout<cute::Shape<cute::_8, Line>, cute::Stride<Line, cute::_1>>{})),
      decltype(cute::composition(
          Swizzle{}, cute::Layout<cute::Shape<Line, cute::_8>, cute::Stride<cute::_1, Line>>{}))>;
  using Layout = decltype(cute::tile_to_shape(
      Atom{}, cute::Shape<cute::Int<kMn>, cute::Int<kDepth>, cute::Int<kStages>>{}));

  __device__ __forceinline__ static int line() { return threadIdx.x / kChunks; }
  __device__ __forceinline__ static int column() { return threadIdx.x % kChunks * kChunk; }

  // Where an element of stage 0 is. Lines kStep apart (a multiple of the swizzle's 8) differ by a
  // constant.
  __device__ __forceinline__ static int offset(int line, int column) {
    return kMajor == Major::kK ? Layout{}(line, column, 0) : Layout{}(column, line, 0);
  }
  static constexpr int step_offset(int i) {
    return kMajor == Major::kK ? int(Layout{}(i * kStep, 0, 0)) : int(Layout{}(0, i * kStep, 0));
  }
};

// --- the arithmetic of a dtype

// bfloat16 and float16: mma.sync.m16n8k16 fed by ldmatrix, transposing where the operand is not
// K-major. Of every 16 * kWarpsN columns a warp takes 16 neighbours.
template <class Element_, class Op>
struct TensorCores {
  using Element = Element_;
  template <int kWarpsM, int kWarpsN>
  using Mma =
      cute::TiledMMA<cute::MMA_Atom<Op>,
                     cute::Layout<cute::Shape<cute::Int<kWarpsM>, cute::Int<kWarpsN>, cute::_1>>,
                     cute::Tile<cute::Int<16 * kWarpsM>,
                                cute::Layout<cute::Shape<cute::_8, cute::Int<kWarpsN>, cute::_2>,
                                             cute::Stride<cute::_1, cute::_16, cute::_8>>,
                                cute::_16>>;
  template <Major kMajor>
  using Copy = cute::Copy_Atom<
      std::conditional_t<kMajor == Major::kK, cute::SM75_U32x4_LDSM_N, cute::SM75_U16x8_LDSM_T>,
      Element>;
  static constexpr int kPair = 2;  // neighbouring columns in neighbouring accumulators
};

// float32: exact products and sums, no TF32. 16 x 8 threads, so that a quarter warp reads one row
// of A and 8 of B; K-major operands are read four k at a time.
struct FusedMultiplyAdd {
  using Element = float;
  template <int kWarpsM, int kWarpsN>
  using Mma =
      cute::TiledMMA<cute::MMA_Atom<cute::UniversalFMA<float, float, float, float>>,
                     cute::Layout<cute::Shape<cute::Int<4 * kWarpsM * kWarpsN>, cute::_8, cute::_1>,
                                  cute::Stride<cute::_8, cute::_1, cute::_0>>,
                     cute::Tile<cute::Int<4 * kWarpsM * kWarpsN>, cute::_8, cute::_4>>;
  template <Major kMajor>
  using Copy = cute::Copy_Atom<
      cute::UniversalCopy<std::conditional_t<kMajor == Major::kK, cute::uint128_t, float>>, float>;
  static constexpr int kPair = 1;
};

template <class T>
struct Arithmetic;
template <>
struct Arithmetic<__nv_bfloat16> {
  using type = TensorCores<cute::bfloat16_t, cute::SM80_16x8x16_F32BF16BF16F32_TN>;
};
template <>
struct Arithmetic<__half> {
  using type = TensorCores<cute::half_t, cute::SM80_16x8x16_F32F16F16F32_TN>;
};
template <>
struct Arithmetic<float> {
  using type = FusedMultiplyAdd;
};

// --- a tile

template <class T_, int kM_, int kN_, int kK_, int kStages_, int kWarpsM, int kWarpsN,
          Major kMajorA, Major kMajorB>
struct Tile {
  using T = T_;
  using Math = typename Arithmetic<T>::type;
  using Element = typename Math::Element;  // T as CuTe knows it
  static constexpr int kM = kM_, kN = kN_, kK = kK_, kStages = kStages_;
  static constexpr int kThreads = kWarp * kWarpsM * kWarpsN;
  static constexpr int kPair = Math::kPair;

  using A = Operand<T, kM, kK, kStages, kThreads, kMajorA>;
  using B = Operand<T, kN, kK, kStages, kThreads, kMajorB>;
  using Mma = typename Math::template Mma<kWarpsM, kWarpsN>;
  using CopyA = typename Math::template Copy<kMajorA>;
  using CopyB = typename Math::template Copy<kMajorB>;
  static_assert(cute::size(Mma{}) == kThreads);

  // The stages of A, then those of B.
  static constexpr int kElementsA = kStages * A::kStageElements;
  static constexpr size_t kPipelineBytes =
      sizeof(T) * kStages * (A::kStageElements + B::kStageElements);
  // Blocks of one multiprocessor that registers are to be saved for (__launch_bounds__): three if a
  // thread's sums and the shared memory of an H100 leave room for them.
  static constexpr int kBlocks =
      kM * kN / kThreads <= 64 && 3 * kPipelineBytes <= 220 * 1024 ? 3 : 2;

  __device__ __forceinline__ static auto zeros() {
    auto acc = cute::partition_fragment_C(Mma{}, cute::Shape<cute::Int<kM>, cute::Int<kN>>{});
    cute::clear(acc);
    return acc;
  }
};

// The tile of a row of kGemmTiles.
template <class T, int kIndex, Major kMajorA, Major kMajorB>
using GemmTileOf = Tile<T, kGemmTiles[kIndex].m, kGemmTiles[kIndex].n, kGemmTiles[kIndex].k,
                        kGemmTiles[kIndex].stages, kGemmTiles[kIndex].warps_m,
                        kGemmTiles[kIndex].warps_n, kMajorA, kMajorB>;

}  // namespace unipool
