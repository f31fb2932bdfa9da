// SPDX-License-Identifier: Apache-2.0
// The host's side of a product: which instance of a kernel runs, and on how many blocks.
//   gemm_tile(problem, wanted, &tile)          the tile that was asked for, or the one chosen
//   for_dtype / for_tile<T>(tile, vector, f)   from run-time values to a compiled instance
//   launch_persistent<kernel>(...)             as many blocks as the device holds at once
#pragma once
#include <algorithm>
#include <type_traits>

#include "cuda/device/kernel.cuh"
#include "unipool/gemm_tiles.h"
#include "unipool/types.h"

namespace unipool {

inline cudaError_t current_gpu(GpuFacts* gpu) {
  int major = 0, minor = 0;
  cudaError_t error = device_attribute(&gpu->sms, cudaDevAttrMultiProcessorCount);
  if (error == cudaSuccess) {
    error = device_attribute(&gpu->shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin);
  }
  if (error == cudaSuccess) error = device_attribute(&major, cudaDevAttrComputeCapabilityMajor);
  if (error == cudaSuccess) error = device_attribute(&minor, cudaDevAttrComputeCapabilityMinor);
  gpu->arch = 10 * major + minor;
  return error;
}

// `wanted` is kAutoTile or a tile that is compiled for the problem; anything else is an error.
inline cudaError_t gemm_tile(const GemmProblem& problem, int wanted, int* tile) {
  GpuFacts gpu{};
  const cudaError_t error = current_gpu(&gpu);
  if (error != cudaSuccess) return error;
  *tile = wanted == kAutoTile ? choose_gemm_tile(problem, gpu) : wanted;
  const bool known = *tile >= 0 && *tile < kTileCount;
  return known && gemm_tile_fits(kGemmTiles[*tile], problem, gpu) ? cudaSuccess
                                                                  : cudaErrorInvalidValue;
}

template <class T>
struct TypeTag {
  using type = T;
};
template <int kTile>
using TileTag = std::integral_constant<int, kTile>;

// f(TypeTag<T>)
template <class F>
cudaError_t for_dtype(DType dtype, const F& f) {
  switch (dtype) {
    case DType::kFloat32:
      return f(TypeTag<float>{});
    case DType::kFloat16:
      return f(TypeTag<__half>{});
    case DType::kBFloat16:
      return f(TypeTag<__nv_bfloat16>{});
  }
  return cudaErrorInvalidValue;
}

// f(TileTag<tile>, std::bool_constant<vector>): the instances that a kernel of T is compiled for.
template <class T, GemmKind kKind = GemmKind::kRows, class F>
cudaError_t for_tile(int tile, bool vector, const F& f) {
  const auto fast = [&](auto tag) {
    if constexpr (kGemmTiles[tag].has(kKind)) return f(tag, std::true_type{});
    return cudaErrorInvalidValue;
  };
  if constexpr (sizeof(T) == sizeof(float)) {
    if (tile != kTileFloat) return cudaErrorInvalidValue;
    return vector ? fast(TileTag<kTileFloat>{}) : f(TileTag<kTileFloat>{}, std::false_type{});
  } else if (!vector) {
    if (tile != kSlowPathTile) return cudaErrorInvalidValue;
    return f(TileTag<kSlowPathTile>{}, std::false_type{});
  } else {
    switch (tile) {
      case kTile16:
        return fast(TileTag<kTile16>{});
      case kTile32:
        return fast(TileTag<kTile32>{});
      case kTile64:
        return fast(TileTag<kTile64>{});
      case kTile128:
        return fast(TileTag<kTile128>{});
    }
    return cudaErrorInvalidValue;
  }
}

// The kernel's blocks take tiles blockIdx.x, + gridDim.x, ... of at most `tiles`.
template <auto kKernel, class... A>
cudaError_t launch_persistent(int threads, size_t smem, int64_t tiles, cudaStream_t stream,
                              const A&... args) {
  if (tiles == 0) return cudaSuccess;
  int sms = 0, resident = 0;
  cudaError_t error = device_attribute(&sms, cudaDevAttrMultiProcessorCount);
  if (error == cudaSuccess) error = resident_blocks<kKernel>(threads, smem, &resident);
  if (error != cudaSuccess) return error;
  const int64_t blocks = std::min(tiles, int64_t(sms) * std::max(resident, 1));
  return launch(kKernel, dim3(unsigned(blocks)), dim3(threads), smem, stream, args...);
}

}  // namespace unipool
