// SPDX-License-Identifier: Apache-2.0
// Prints the table of tiles as JSON, and on which GPUs the launchers let each be chosen:
//   gemm_tiles CAPABILITY:BYTES ...     BYTES: shared memory that a block may opt in to
#include "unipool/gemm_tiles.h"

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

namespace {

using namespace unipool;

bool may_be_chosen(const GemmTile& tile, const GpuFacts& gpu) {
  for (const GemmKind kind : {GemmKind::kRows, GemmKind::kRowsBwd, GemmKind::kWgrad}) {
    if (gemm_tile_fits(tile, {kind, 1, 1, 1, 1, tile.element_bytes, true}, gpu)) return true;
  }
  return false;
}

}  // namespace

int main(int argc, char** argv) {
  std::vector<GpuFacts> gpus;
  for (int i = 1; i < argc; ++i) {
    const char* bytes = std::strchr(argv[i], ':');
    if (bytes == nullptr) return 2;
    gpus.push_back({1, std::atoi(bytes + 1), std::atoi(argv[i])});
  }
  const char* separator = "[";
  for (const GemmTile& tile : kGemmTiles) {
    std::printf(
        "%s{\"name\": \"%s\", \"element_bytes\": %d, \"m\": %d, \"n\": %d, \"k\": %d, "
        "\"stages\": %d, \"warps\": [%d, %d], \"pipeline_bytes\": %d, \"launch_bytes\": %d, "
        "\"chosen_on\": [",
        separator, tile.name, tile.element_bytes, tile.m, tile.n, tile.k, tile.stages, tile.warps_m,
        tile.warps_n, tile.shared_bytes(), tile.shared_bytes() + kGemmScheduleBytes);
    const char* comma = "";
    for (const GpuFacts& gpu : gpus) {
      if (!may_be_chosen(tile, gpu)) continue;
      std::printf("%s%d", comma, gpu.arch);
      comma = ", ";
    }
    std::printf("]}");
    separator = ",\n ";
  }
  std::printf("]\n");
}
