// SPDX-License-Identifier: Apache-2.0
#include "cpu/gemm.h"

#include <ATen/core/Tensor.h>
#include <ATen/native/CPUBlas.h>
#include <ATen/ops/addmm.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/mm.h>
#include <c10/util/BFloat16.h>
#include <c10/util/Exception.h>

namespace unipool::cpu {
namespace {

namespace blas = at::native::cpublas;

// ATen has no question to ask: brgemm throws where oneDNN has no kernel for this processor.
template <class Try>
bool works(Try attempt) {
  try {
    attempt();
    return true;
  } catch (const c10::Error&) {
    return false;
  }
}

bool has_float_brgemm() {
#ifdef CPUBLAS_BRGEMM_F32F32F32
  static const bool result = works([] {
    const float a = 1;
    float c = 0;
    blas::brgemm(1, 1, 1, 1, 1, 1, false, &a, &a, &c, false);
    blas::brgemm_release(false);
  });
  return result;
#else
  return false;
#endif
}

// ATen's own product, as it exports no plain BLAS call; two views' worth of overhead.
template <class T>
void aten_product(int64_t m, int64_t n, int64_t k, const T* a, int64_t lda, const T* b, int64_t ldb,
                  T* c, int64_t ldc, bool add) {
  const auto matrix = [](const T* x, int64_t rows, int64_t columns, int64_t ld) {
    return at::from_blob(const_cast<T*>(x), {rows, columns}, {ld, 1},
                         at::TensorOptions(c10::CppTypeToScalarType<T>::value));
  };
  auto out = matrix(c, m, n, ldc);
  if (add) {
    at::addmm_out(out, out, matrix(a, m, k, lda), matrix(b, k, n, ldb));
  } else {
    at::mm_out(out, matrix(a, m, k, lda), matrix(b, k, n, ldb));
  }
}

}  // namespace

bool has_pairs_product() {
#ifdef CPUBLAS_BRGEMM_BF16BF16F32
  static const bool result = works([] {
    const at::BFloat16 a[2] = {1.0f, 1.0f};
    float c = 0;
    blas::brgemm(1, 1, 2, 2, 1, 1, false, a, a, &c, true);
    blas::brgemm_release(true);
  });
  return result;
#else
  return false;
#endif
}

void product(int64_t m, int64_t n, int64_t k, const float* a, int64_t lda, const float* b,
             int64_t ldb, float* c, int64_t ldc, bool add) {
#ifdef CPUBLAS_BRGEMM_F32F32F32
  if (has_float_brgemm()) {
    blas::brgemm(m, n, k, lda, ldb, ldc, add, a, b, c, false);
    return;
  }
#endif
  aten_product(m, n, k, a, lda, b, ldb, c, ldc, add);
}

void product(int64_t m, int64_t n, int64_t k, const double* a, int64_t lda, const double* b,
             int64_t ldb, double* c, int64_t ldc, bool add) {
  aten_product(m, n, k, a, lda, b, ldb, c, ldc, add);
}

void product_pairs(int64_t m, int64_t n, int64_t k, const bf16* a, int64_t lda, const bf16* b,
                   int64_t ldb, float* c, int64_t ldc, bool add) {
#ifdef CPUBLAS_BRGEMM_BF16BF16F32
  blas::brgemm(m, n, k, lda, ldb, ldc, add, reinterpret_cast<const at::BFloat16*>(a),
               reinterpret_cast<const at::BFloat16*>(b), c, true);
#else
  TORCH_INTERNAL_ASSERT(false, "product_pairs without bfloat16 brgemm");
#endif
}

ProductScope::~ProductScope() {
#ifdef CPUBLAS_BRGEMM_BF16BF16F32
  if (has_pairs_product()) blas::brgemm_release(true);
#endif
}

}  // namespace unipool::cpu
