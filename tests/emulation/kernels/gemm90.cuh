// SPDX-License-Identifier: Apache-2.0
// D[M,N] = A[M,K] * B[N,K]^T on Hopper: one producer warp issues TMA loads into a ring of stages
// guarded by mbarriers, two warpgroups run wgmma.  BUG: 1 the producer does not wait for an empty
// stage, 2 no warpgroup_wait before the stage is given back, 3 wrong transaction count.
#pragma once
// clang-format off: CuTe's headers want this order
#include <cute/tensor.hpp>
#include <cute/atom/mma_atom.hpp>
#include <cute/atom/copy_atom.hpp>
#include <cute/arch/copy_sm90.hpp>
#include <cute/arch/mma_sm90.hpp>
// clang-format on

#include "cuda/device/portable.cuh"

namespace gemm90 {
using namespace cute;
using T = cute::bfloat16_t;
constexpr int BM = 128, BN = 128, BK = 64, STAGES = 3, CONSUMERS = 256, THREADS = CONSUMERS + 32;
using SmemA = decltype(tile_to_shape(SM90::GMMA::Layout_K_SW128_Atom<T>{},
                                     Shape<Int<BM>, Int<BK>, Int<STAGES>>{}));
using SmemB = decltype(tile_to_shape(SM90::GMMA::Layout_K_SW128_Atom<T>{},
                                     Shape<Int<BN>, Int<BK>, Int<STAGES>>{}));
using Mma = decltype(make_tiled_mma(
    SM90_64x128x16_F32BF16BF16_SS<SM90::GMMA::Major::K, SM90::GMMA::Major::K>{},
    Layout<Shape<_2, _1, _1>>{}));
struct Shared {
  alignas(1024) T a[cosize_v<SmemA>];
  alignas(1024) T b[cosize_v<SmemB>];
  alignas(8) uint64_t full[STAGES], empty[STAGES];
};
__device__ __forceinline__ void fence_barrier_init() {
#ifdef __CUDA_ARCH__
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
#endif
}

template <class TmaA, class TmaB, int BUG>
__global__ void __launch_bounds__(THREADS)
    kernel(const __grid_constant__ TmaA tma_a, const __grid_constant__ TmaB tma_b, float* D, int M,
           int N, int K) {
  auto& sh = *unipool::dynamic_shared<Shared>(1);
  const int t = threadIdx.x, ktiles = (K + BK - 1) / BK;
  Tensor sA = make_tensor(make_smem_ptr(sh.a), SmemA{});
  Tensor sB = make_tensor(make_smem_ptr(sh.b), SmemB{});
  if (t == 0) {
    for (int s = 0; s < STAGES; ++s) {
      initialize_barrier(sh.full[s], 1);
      initialize_barrier(sh.empty[s], CONSUMERS);
    }
    fence_barrier_init();
  }
  __syncthreads();
  if (t >= CONSUMERS) {
    if (t == CONSUMERS) {
      Tensor gA = local_tile(tma_a.get_tma_tensor(make_shape(M, K)), Shape<Int<BM>, Int<BK>>{},
                             make_coord(int(blockIdx.y), _));
      Tensor gB = local_tile(tma_b.get_tma_tensor(make_shape(N, K)), Shape<Int<BN>, Int<BK>>{},
                             make_coord(int(blockIdx.x), _));
      auto cta_a = tma_a.get_slice(0);
      auto cta_b = tma_b.get_slice(0);
      Tensor tAgA = cta_a.partition_S(gA);
      Tensor tAsA = cta_a.partition_D(sA);
      Tensor tBgB = cta_b.partition_S(gB);
      Tensor tBsB = cta_b.partition_D(sB);
      for (int k = 0; k < ktiles; ++k) {
        const int s = k % STAGES, round = k / STAGES;
        if (round && BUG != 1) wait_barrier(sh.empty[s], (round - 1) & 1);
        set_barrier_transaction_bytes(sh.full[s], (BM + BN) * BK * sizeof(T) + (BUG == 3 ? 16 : 0));
        copy(tma_a.with(sh.full[s]), tAgA(_, _, _, k), tAsA(_, _, _, s));
        copy(tma_b.with(sh.full[s]), tBgB(_, _, _, k), tBsB(_, _, _, s));
      }
    }
    return;
  }
  Mma mma;
  auto thr = mma.get_slice(t);
  Tensor rA = thr.make_fragment_A(thr.partition_A(sA));
  Tensor rB = thr.make_fragment_B(thr.partition_B(sB));
  Tensor acc = partition_fragment_C(mma, Shape<Int<BM>, Int<BN>>{});
  clear(acc);
  for (int k = 0; k < ktiles; ++k) {
    const int s = k % STAGES;
    wait_barrier(sh.full[s], (k / STAGES) & 1);
    warpgroup_fence_operand(acc);
    warpgroup_arrive();
    cute::gemm(mma, rA(_, _, _, s), rB(_, _, _, s), acc);
    warpgroup_commit_batch();
    if (BUG != 2) warpgroup_wait<0>();
    warpgroup_fence_operand(acc);
    arrive_barrier(sh.empty[s]);
  }
  warpgroup_wait<0>();
  Tensor cC = thr.partition_C(make_identity_tensor(Shape<Int<BM>, Int<BN>>{}));
  for (int i = 0; i < size(acc); ++i) {
    const int r = blockIdx.y * BM + get<0>(cC(i)), c = blockIdx.x * BN + get<1>(cC(i));
    if (r < M && c < N) D[size_t(r) * N + c] = acc(i);
  }
}

template <int BUG = 0>
cudaError_t run(const void* A, const void* B, int M, int N, int K, float* D, cudaStream_t s) {
  Tensor gA =
      make_tensor(make_gmem_ptr(static_cast<const T*>(A)), make_shape(M, K), make_stride(K, _1{}));
  Tensor gB =
      make_tensor(make_gmem_ptr(static_cast<const T*>(B)), make_shape(N, K), make_stride(K, _1{}));
  auto tma_a =
      make_tma_copy(SM90_TMA_LOAD{}, gA, SmemA{}(_, _, 0), Shape<Int<BM>, Int<BK>>{}, _1{});
  auto tma_b =
      make_tma_copy(SM90_TMA_LOAD{}, gB, SmemB{}(_, _, 0), Shape<Int<BN>, Int<BK>>{}, _1{});
  return unipool::launch(kernel<decltype(tma_a), decltype(tma_b), BUG>,
                         dim3((N + BN - 1) / BN, (M + BM - 1) / BM), dim3(THREADS), sizeof(Shared),
                         s, tma_a, tma_b, D, M, N, K);
}
}  // namespace gemm90
