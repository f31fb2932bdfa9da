// SPDX-License-Identifier: Apache-2.0
// unipool._C: facts about the build, and the tiles of the expert products. The ops themselves are
// registered with torch by the op libraries.
#include <pybind11/pybind11.h>

#include <cstdint>
#include <string>

#include "unipool/gemm_tiles.h"
#include "unipool/limits.h"

namespace py = pybind11;

namespace {

using unipool::GemmKind;
using unipool::GemmTile;

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

// --- tiles

constexpr struct {
  const char* name;
  GemmKind kind;
} kKinds[] = {
    {"rows", GemmKind::kRows},
    {"rows_bwd", GemmKind::kRowsBwd},
    {"wgrad", GemmKind::kWgrad},
};

const char* family_name(unipool::GemmFamily family) {
  switch (family) {
    case unipool::GemmFamily::kSm80:
      return "sm80";
  }
  return "";
}

py::dict describe(const GemmTile& tile) {
  py::list kinds;
  for (const auto& [name, kind] : kKinds) {
    if (tile.has(kind)) kinds.append(name);
  }
  py::dict entry;
  entry["name"] = tile.name;
  entry["family"] = family_name(tile.family);
  entry["kinds"] = kinds;
  entry["element_bytes"] = tile.element_bytes;
  entry["m"] = tile.m;
  entry["n"] = tile.n;
  entry["k"] = tile.k;
  entry["stages"] = tile.stages;
  entry["warps"] = py::make_tuple(tile.warps_m, tile.warps_n);
  entry["threads"] = tile.threads();
  entry["shared_bytes"] = tile.shared_bytes();
  return entry;
}

py::list gemm_tiles() {
  py::list tiles;
  for (const GemmTile& tile : unipool::kGemmTiles) tiles.append(describe(tile));
  return tiles;
}

GemmKind kind_named(const std::string& wanted) {
  for (const auto& [name, kind] : kKinds) {
    if (wanted == name) return kind;
  }
  throw py::value_error("choose_gemm_tile: kind must be rows, rows_bwd or wgrad, got " + wanted);
}

void require_at_least(const char* name, int64_t value, int64_t least) {
  if (value >= least) return;
  throw py::value_error(std::string("choose_gemm_tile: ") + name + " must be at least " +
                        std::to_string(least) + ", got " + std::to_string(value));
}

py::object choose_gemm_tile(const std::string& kind, int64_t rows, int64_t experts, int64_t n,
                            int64_t k, int element_bytes, bool vector, int sms, int shared_bytes,
                            int arch) {
  require_at_least("rows", rows, 0);
  require_at_least("experts", experts, 1);
  require_at_least("n", n, 1);
  require_at_least("k", k, 1);
  require_at_least("sms", sms, 1);
  const int tile = unipool::choose_gemm_tile(
      {kind_named(kind), rows, experts, n, k, element_bytes, vector}, {sms, shared_bytes, arch});
  if (tile == unipool::kAutoTile) return py::none();
  return py::str(unipool::kGemmTiles[tile].name);
}

double gemm_tile_rate(const std::string& wanted, int arch) {
  for (const GemmTile& tile : unipool::kGemmTiles) {
    if (wanted != tile.name) continue;
    const double clocks = unipool::gemm_stage_clocks(tile, unipool::sm_rates(arch));
    return 2.0 * tile.m * tile.n * tile.k / clocks;
  }
  throw py::value_error("gemm_tile_rate: tile must be one of gemm_tiles(), got " + wanted);
}

py::dict limits() {
  py::dict all;
  all["experts"] = unipool::kExpertLimit;
  all["top_k"] = unipool::kTopKLimit;
  all["plan_segments"] = unipool::kPlanSegmentLimit;
  all["wgrad_segments"] = unipool::kWgradSegmentLimit;
  return all;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Facts about this build of UniPool.";
  m.def("build_info", &build_info,
        "Versions and flags that the op libraries were built with, as a dict of strings.");
  m.def("limits", &limits,
        "How far the ops go: experts (M, on CUDA), top_k (of the routers), and the layers that one "
        "launch takes of a plan (plan_segments) and of a weight gradient (wgrad_segments); more "
        "layers are taken in several launches.");
  m.def("gemm_tiles", &gemm_tiles,
        "The tiles that the CUDA expert products are compiled for, as a list of dicts; a launch "
        "names a tile by its index. kinds: rows (x W^T), rows_bwd (x W), wgrad; m, n, k: rows, "
        "columns and depth of a stage; warps: over m and n; shared_bytes: of all stages.");
  m.def("choose_gemm_tile", &choose_gemm_tile, py::arg("kind"), py::arg("rows"), py::arg("experts"),
        py::arg("n"), py::arg("k"), py::kw_only(), py::arg("element_bytes") = 2,
        py::arg("vector") = true, py::arg("sms") = 132, py::arg("shared_bytes") = 227 * 1024,
        py::arg("arch") = 90,
        "The name of the tile that a product is launched with, None if none fits. rows, rows_bwd: "
        "[rows, n] summed over k; wgrad: [experts, n, k] summed over rows. vector: all rows can be "
        "read 16 bytes at a time; sms, shared_bytes a block may have, arch (10 * major + minor): "
        "of the GPU, by default an H100's.");
  m.def("gemm_tile_rate", &gemm_tile_rate, py::arg("tile"), py::arg("arch") = 90,
        "Floating-point operations a clock that the choice expects of one multiprocessor busy with "
        "full tiles of this name.");
}
