// SPDX-License-Identifier: Apache-2.0
// Grouped GEMM with a gathered A operand, CuTe, SM80 atoms:
//   D[p, :] = A[row[p], :] * B[e]^T   for each expert e and position p in [offset[e], offset[e +
//   1])
// A [*, K], B [experts, N, K] bf16, K a multiple of 8; D [positions, N].
// BUG: 1 drops the __syncthreads of the main loop, 2 drops the cp_async_wait, 3 no row predicate.
#pragma once
// clang-format off: CuTe's headers want this order
#include <cute/tensor.hpp>
#include <cute/atom/mma_atom.hpp>
#include <cute/atom/copy_atom.hpp>
// clang-format on

#include "cuda/device/portable.cuh"

namespace gemm {
using namespace cute;

template <int BM_, int BN_, int BK_, int STAGES_, int WM, int WN>
struct Config {
  static constexpr int BM = BM_, BN = BN_, BK = BK_, STAGES = STAGES_, THREADS = 32 * WM * WN;
  using T = cute::bfloat16_t;
  using Atom = decltype(composition(Swizzle<3, 3, 3>{}, Layout<Shape<_8, _64>, Stride<_64, _1>>{}));
  using SmemA = decltype(tile_to_shape(Atom{}, Shape<Int<BM>, Int<BK>, Int<STAGES>>{}));
  using SmemB = decltype(tile_to_shape(Atom{}, Shape<Int<BN>, Int<BK>, Int<STAGES>>{}));
  using Mma = TiledMMA<MMA_Atom<SM80_16x8x16_F32BF16BF16F32_TN>,
                       Layout<Shape<Int<WM>, Int<WN>, _1>>, Tile<Int<16 * WM>, Int<16 * WN>, _16>>;
  using G2SAtom = Copy_Atom<SM80_CP_ASYNC_CACHEGLOBAL_ZFILL<uint128_t>, T>;
  using G2S = decltype(make_tiled_copy(
      G2SAtom{}, Layout<Shape<Int<THREADS / 8>, _8>, Stride<_8, _1>>{}, Layout<Shape<_1, _8>>{}));
  using S2RAtom = Copy_Atom<SM75_U32x4_LDSM_N, T>;
  struct Shared {
    alignas(128) T a[cosize_v<SmemA>];
    alignas(128) T b[cosize_v<SmemB>];
  };
};

template <class C, class Out, int BUG>
__global__ void __launch_bounds__(C::THREADS)
    kernel(const typename C::T* __restrict__ A, const int* __restrict__ row,
           const typename C::T* __restrict__ B, const int* __restrict__ offset, int experts, int N,
           int K, Out* __restrict__ D) {
  using T = typename C::T;
  auto& sh = *unipool::dynamic_shared<typename C::Shared>(1);

  // blockIdx.y counts the row tiles of all experts: find ours.
  int tile = blockIdx.y, e = 0, lo = 0, hi = 0;
  for (; e < experts; ++e) {
    lo = offset[e];
    hi = offset[e + 1];
    const int tiles = (hi - lo + C::BM - 1) / C::BM;
    if (tile < tiles) break;
    tile -= tiles;
  }
  if (e == experts) return;  // the whole block leaves
  const int m0 = lo + tile * C::BM, rows = hi - m0, n0 = blockIdx.x * C::BN, t = threadIdx.x;

  Tensor sA = make_tensor(make_smem_ptr(sh.a), typename C::SmemA{});
  Tensor sB = make_tensor(make_smem_ptr(sh.b), typename C::SmemB{});

  // ---- global -> shared: each thread copies 16-byte chunks, rows (THREADS / 8) apart ----
  typename C::G2S g2s;
  auto mine = g2s.get_slice(t);
  Tensor tAsA = mine.partition_D(sA);  // (CPY, CPY_M, CPY_K, STAGE)
  Tensor tBsB = mine.partition_D(sB);
  Tensor tAcA = mine.partition_D(make_identity_tensor(Shape<Int<C::BM>, Int<C::BK>>{}));
  Tensor tBcB = mine.partition_D(make_identity_tensor(Shape<Int<C::BN>, Int<C::BK>>{}));
  const T* a_row[size<1>(tAsA)];
  bool a_ok[size<1>(tAsA)];
  CUTE_UNROLL
  for (int m = 0; m < size<1>(tAsA); ++m) {
    const int r = get<0>(tAcA(0, m, 0));
    a_ok[m] = r < rows || BUG == 3;
    a_row[m] = A + size_t(a_ok[m] ? row[m0 + r] : 0) * K;
  }
  const T* b_expert = B + size_t(e) * N * K;
  auto load = [&](int kt, int stage) {
    CUTE_UNROLL
    for (int k = 0; k < size<2>(tAsA); ++k) {
      CUTE_UNROLL
      for (int m = 0; m < size<1>(tAsA); ++m) {
        const int c = kt * C::BK + get<1>(tAcA(0, m, k));
        const bool ok = a_ok[m] && c < K;
        Tensor src = make_tensor(make_gmem_ptr(a_row[m] + (ok ? c : 0)), Layout<Shape<_8>>{});
        copy(typename C::G2SAtom{}.with(ok), src, tAsA(_, m, k, stage));
      }
      CUTE_UNROLL
      for (int n = 0; n < size<1>(tBsB); ++n) {
        const int r = n0 + get<0>(tBcB(0, n, k)), c = kt * C::BK + get<1>(tBcB(0, n, k));
        const bool ok = r < N && c < K;
        Tensor src = make_tensor(make_gmem_ptr(b_expert + (ok ? size_t(r) * K + c : 0)),
                                 Layout<Shape<_8>>{});
        copy(typename C::G2SAtom{}.with(ok), src, tBsB(_, n, k, stage));
      }
    }
  };

  // ---- shared -> registers -> tensor cores ----
  typename C::Mma mma;
  auto thr = mma.get_slice(t);
  Tensor acc = partition_fragment_C(mma, Shape<Int<C::BM>, Int<C::BN>>{});
  Tensor rA = thr.partition_fragment_A(sA(_, _, 0));  // (MMA, MMA_M, MMA_K)
  Tensor rB = thr.partition_fragment_B(sB(_, _, 0));
  auto s2rA = make_tiled_copy_A(typename C::S2RAtom{}, mma);
  auto s2rB = make_tiled_copy_B(typename C::S2RAtom{}, mma);
  Tensor tXsA = s2rA.get_slice(t).partition_S(sA);
  Tensor tXrA = s2rA.get_slice(t).retile_D(rA);
  Tensor tXsB = s2rB.get_slice(t).partition_S(sB);
  Tensor tXrB = s2rB.get_slice(t).retile_D(rB);
  clear(acc);

  const int ktiles = (K + C::BK - 1) / C::BK;
  CUTE_UNROLL
  for (int s = 0; s < C::STAGES - 1; ++s) {
    if (s < ktiles) load(s, s);
    cp_async_fence();
  }
  for (int kt = 0; kt < ktiles; ++kt) {
    if (BUG != 2) cp_async_wait<C::STAGES - 2>();
    if (BUG != 1)
      __syncthreads();  // tile kt has landed for all; all are done with the stage that is refilled
                        // next
    if (kt + C::STAGES - 1 < ktiles) load(kt + C::STAGES - 1, (kt + C::STAGES - 1) % C::STAGES);
    cp_async_fence();
    const int s = kt % C::STAGES;
    CUTE_UNROLL
    for (int k = 0; k < size<2>(rA); ++k) {
      copy(s2rA, tXsA(_, _, k, s), tXrA(_, _, k));
      copy(s2rB, tXsB(_, _, k, s), tXrB(_, _, k));
      cute::gemm(mma, rA(_, _, k), rB(_, _, k), acc);
    }
  }
  cp_async_wait<0>();

  Tensor cC = thr.partition_C(make_identity_tensor(Shape<Int<C::BM>, Int<C::BN>>{}));
  CUTE_UNROLL
  for (int i = 0; i < size(acc); ++i) {
    const int r = get<0>(cC(i)), c = n0 + get<1>(cC(i));
    if (r < rows && c < N) D[size_t(m0 + r) * N + c] = Out(acc(i));
  }
}

template <class C, class Out, int BUG = 0>
cudaError_t run(const void* A, const int* row, const void* B, const int* offset, int experts,
                int positions, int N, int K, void* D, cudaStream_t s) {
  const int tiles =
      positions / C::BM + experts;  // an upper bound: blocks beyond the last tile leave at once
  using T = typename C::T;
  return unipool::launch(kernel<C, Out, BUG>, dim3((N + C::BN - 1) / C::BN, tiles),
                         dim3(C::THREADS), sizeof(typename C::Shared), s, static_cast<const T*>(A),
                         row, static_cast<const T*>(B), offset, experts, N, K,
                         static_cast<Out*>(D));
}
}  // namespace gemm
