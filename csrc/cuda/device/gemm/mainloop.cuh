// SPDX-License-Identifier: Apache-2.0
// multiply(): acc += the sum over K of one tile, as a pipeline with two levels. Tile::kStages - 1 k
// tiles are on their way from global memory while one is worked on; and while the tensor cores work
// on one depth of 16, ldmatrix brings the next into registers. One barrier per k tile.
//
// Loaders: see loaders.cuh; any object with load(stage) will do that brings the k tiles in order.
// After multiply() all copies have landed, but other warps may still read the last stage: a barrier
// is due before `smem` is used for anything else, and another one before the next multiply().
#pragma once
#include "cuda/device/gemm/tile.cuh"

namespace unipool {

// The stages of the pipeline: those in use, one to read and one to write.
template <class Tile>
class Stages {
 public:
  __device__ __forceinline__ static void wait_for_next() {
    cute::cp_async_wait<Tile::kStages - 2>();
    __syncthreads();
  }
  __device__ __forceinline__ int read() const { return read_; }
  __device__ __forceinline__ void next_read() { read_ = next(read_); }

  // Sends the next k tile, if there is one, on its way into the stage that was read before last.
  template <class LoaderA, class LoaderB>
  __device__ __forceinline__ void load(LoaderA& load_a, LoaderB& load_b, bool exists) {
    if (exists) {
      load_a.load(write_);
      load_b.load(write_);
    }
    cute::cp_async_fence();  // of an empty group too, so that the waits count right
    write_ = next(write_);
  }

 private:
  __device__ __forceinline__ static int next(int stage) {
    return stage == Tile::kStages - 1 ? 0 : stage + 1;
  }
  int read_ = 0, write_ = 0;
};

template <class Tile, class LoaderA, class LoaderB, class Acc>
__device__ __forceinline__ void multiply(typename Tile::T* smem, LoaderA& load_a, LoaderB& load_b,
                                         int k_tiles, Acc& acc) {
  using namespace cute;
  if (k_tiles == 0) return;
  Stages<Tile> stages;
  CUTE_UNROLL
  for (int tile = 0; tile < Tile::kStages - 1; ++tile) {
    stages.load(load_a, load_b, tile < k_tiles);
  }

  auto* data = reinterpret_cast<typename Tile::Element*>(smem);
  Tensor sA = make_tensor(make_smem_ptr(data), typename Tile::A::Layout{});
  Tensor sB = make_tensor(make_smem_ptr(data + Tile::kElementsA), typename Tile::B::Layout{});
  typename Tile::Mma mma;
  auto thread = mma.get_slice(threadIdx.x);
  Tensor rA = thread.partition_fragment_A(sA(_, _, 0));  // (atom, rows, k)
  Tensor rB = thread.partition_fragment_B(sB(_, _, 0));
  auto copy_a = make_tiled_copy_A(typename Tile::CopyA{}, mma);
  auto copy_b = make_tiled_copy_B(typename Tile::CopyB{}, mma);
  Tensor from_a = copy_a.get_slice(threadIdx.x).partition_S(sA);  // (atom, rows, k, stage)
  Tensor from_b = copy_b.get_slice(threadIdx.x).partition_S(sB);
  Tensor to_a = copy_a.get_slice(threadIdx.x).retile_D(rA);
  Tensor to_b = copy_b.get_slice(threadIdx.x).retile_D(rB);
  constexpr int kBlocks = size<2>(to_a);  // what is copied at once
  static_assert(kBlocks > 1, "the loop loads into a stage that its first block no longer reads");
  constexpr int kAtoms = size<2>(rA) / kBlocks;  // MMA atoms along K in a block
  const auto fetch = [&](int block, int stage) {
    copy(copy_a, from_a(_, _, block, stage), to_a(_, _, block));
    copy(copy_b, from_b(_, _, block, stage), to_b(_, _, block));
  };

  stages.wait_for_next();
  fetch(0, 0);
  CUTE_NO_UNROLL
  for (int tile = 0; tile < k_tiles; ++tile) {
    CUTE_UNROLL
    for (int block = 0; block < kBlocks; ++block) {
      if (block < kBlocks - 1) {
        fetch(block + 1, stages.read());
      } else if (tile + 1 < k_tiles) {
        // The next k tile has landed for all, and all are done with the stage before it.
        stages.wait_for_next();
        stages.next_read();
        fetch(0, stages.read());
      }
      if (block == 0) stages.load(load_a, load_b, tile + Tile::kStages - 1 < k_tiles);
      CUTE_UNROLL
      for (int k = block * kAtoms; k < (block + 1) * kAtoms; ++k) {
        gemm(mma, rA(_, _, k), rB(_, _, k), acc);
      }
    }
  }
}

}  // namespace unipool
