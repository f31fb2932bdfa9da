// SPDX-License-Identifier: Apache-2.0
// unipool._C: facts about the build. The ops themselves are registered with torch by the op
// libraries.
#include <pybind11/pybind11.h>

namespace py = pybind11;

namespace {

py::dict build_info() {
  py::dict info;
  info["version"] = UNIPOOL_VERSION;
  info["torch"] = UNIPOOL_TORCH_VERSION;
  info["compiler"] = UNIPOOL_COMPILER;
  info["build_type"] = UNIPOOL_BUILD_TYPE;
  info["cuda"] = UNIPOOL_CUDA_VERSION;  // empty without CUDA ops
  info["cuda_architectures"] = UNIPOOL_CUDA_ARCHITECTURES;
  return info;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Facts about this build of UniPool.";
  m.def("build_info", &build_info,
        "Versions and flags that the op libraries were built with, as a dict of strings.");
}
