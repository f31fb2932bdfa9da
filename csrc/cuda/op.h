// SPDX-License-Identifier: Apache-2.0
// What the glue of every CUDA op needs: device guard, current stream, pointers, launch errors.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <c10/util/Exception.h>
#include <cuda_runtime_api.h>

#include <optional>

#include "ops/checks.h"
#include "unipool/nvtx.h"
#include "unipool/types.h"

namespace unipool::cuda {

inline DType dtype_of(const char* op, const at::Tensor& t) {
  switch (t.scalar_type()) {
    case at::kFloat:
      return DType::kFloat32;
    case at::kHalf:
      return DType::kFloat16;
    case at::kBFloat16:
      return DType::kBFloat16;
    default:
      C10_THROW_ERROR(TypeError, c10::str(op, ": dtype must be float32, float16 or bfloat16, got ",
                                          t.scalar_type()));
  }
}

// From here to the end of the scope, the device of `like` is the current one. Pointers of a
// launch's tensors are taken through it.
class LaunchScope {
 public:
  explicit LaunchScope(const at::Tensor& like) : guard_(like.device()) {}

  const void* data(const at::Tensor& t) const { return t.const_data_ptr(); }
  void* mutable_data(const at::Tensor& t) const { return t.mutable_data_ptr(); }

  template <class T>
  const T* data(const at::Tensor& t) const {
    return static_cast<const T*>(data(t));
  }
  template <class T>
  const T* data(const OptionalTensor& t) const {
    return t ? data<T>(*t) : nullptr;
  }
  template <class T>
  T* mutable_data(const at::Tensor& t) const {
    return static_cast<T*>(mutable_data(t));
  }

  // Bytes that live until the end of this scope; the caching allocator orders their reuse.
  void* workspace(size_t bytes, const at::Tensor& like) {
    workspace_ = at::empty({static_cast<int64_t>(bytes)}, like.options().dtype(at::kByte));
    return mutable_data(workspace_);
  }

  template <class Args>
  void run(cudaError_t (*launch)(const Args&, cudaStream_t), const Args& args) const {
    C10_CUDA_CHECK(launch(args, c10::cuda::getCurrentCUDAStream()));
  }

 private:
  c10::cuda::CUDAGuard guard_;
  at::Tensor workspace_;
};

inline OptionalTensor contiguous(const OptionalTensor& t) {
  return t ? OptionalTensor(t->contiguous()) : std::nullopt;
}

// unpermute (dispatch_op.cpp) into memory that is there, for ops that end with it.
void unpermute_into(const at::Tensor& out, const at::Tensor& y, const at::Tensor& inverse,
                    const OptionalTensor& weights);

}  // namespace unipool::cuda
