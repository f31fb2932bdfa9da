// SPDX-License-Identifier: Apache-2.0
// The tiles that the expert products are compiled for, and the choice among them: plain host code,
// the same for the launchers, for unipool._C.gemm_tiles() and for tests.
#pragma once
#include <cstdint>

namespace unipool {

enum class GemmKind { kRows, kRowsBwd, kWgrad };  // rows x W^T, rows x W, and the weight gradient
enum class GemmFamily { kSm80 };                  // mma.sync, cp.async

constexpr int kAutoTile = -1;

constexpr unsigned kind_bit(GemmKind kind) { return 1u << static_cast<unsigned>(kind); }
constexpr unsigned kRowKinds = kind_bit(GemmKind::kRows) | kind_bit(GemmKind::kRowsBwd);
constexpr unsigned kAllKinds = kRowKinds | kind_bit(GemmKind::kWgrad);

// m: rows (weight gradient: rows of the weight); n: columns; k: depth of a stage.
struct GemmTile {
  const char* name;
  GemmFamily family;
  int m, n, k;
  int stages;
  int warps_m, warps_n;
  int element_bytes;  // of the operands: 2 for float16 and bfloat16, 4 for float32
  unsigned kinds;     // bits of the products that it is compiled for

  constexpr int threads() const { return 32 * warps_m * warps_n; }
  constexpr int warp_m() const { return m / warps_m; }
  constexpr int warp_n() const { return n / warps_n; }
  constexpr bool has(GemmKind kind) const { return (kinds & kind_bit(kind)) != 0; }
  // Of the pipeline; the epilogue reuses it.
  constexpr int shared_bytes() const { return stages * (m + n) * k * element_bytes; }
};

// Indices into kGemmTiles.
enum GemmTileId : int { kTile16, kTile32, kTile64, kTile128, kTileFloat, kTileCount };

// A warp's part of a tile decides what a multiply costs in shared memory reads: 64x64 needs half
// the bandwidth of an SM on a full tensor core, 16x32 all of it and a half more. Below 64 rows per
// expert that is paid for by reading less: there the weights' way from memory is the limit, and
// four stages of 128 columns keep it busy. 128 rows hold 128 sums per thread; stages of 32 instead
// of 64 leave room for two blocks per SM, one of which stores while the other multiplies.
inline constexpr GemmTile kGemmTiles[kTileCount] = {
    {"t16", GemmFamily::kSm80, 16, 128, 64, 4, 1, 4, 2, kRowKinds},
    {"t32", GemmFamily::kSm80, 32, 128, 64, 4, 1, 4, 2, kRowKinds},
    {"t64", GemmFamily::kSm80, 64, 128, 64, 3, 2, 2, 2, kAllKinds},
    {"t128", GemmFamily::kSm80, 128, 128, 32, 4, 2, 2, 2, kAllKinds},
    {"f32", GemmFamily::kSm80, 64, 64, 16, 3, 2, 2, 4, kAllKinds},
};

constexpr int kSlowPathTile = kTile64;  // operands without 16-byte rows: the one tile compiled

// Beside the pipeline a block keeps the tiles of each expert, and what a kind's epilogue needs.
constexpr int kGemmScheduleBytes = 12 * 1024;

// Rows and RowsBwd give [rows, n], summed over k; Wgrad gives [experts, n, k], summed over the rows
// of an expert (in all segments).
struct GemmProblem {
  GemmKind kind;
  int64_t rows;
  int64_t experts;
  int64_t n, k;
  int element_bytes;
  bool vector;  // every operand's rows can be read 16 bytes at a time
};

struct GpuFacts {
  int sms;
  int shared_bytes;  // that one block may opt in to
  int arch;          // compute capability: 10 * major + minor
};

// What one SM does in a clock, about: floating-point operations on 16-bit operands (mma.sync) and
// on float32 (FFMA), and bytes from shared memory, L2 and DRAM. Only their ratios matter.
struct SmRates {
  double flops, flops32, shared_bytes, l2_bytes, dram_bytes;
};

constexpr SmRates sm_rates(int arch) {
  if (arch >= 90) return {2600, 256, 128, 40, 13};  // mma.sync: some 60% of wgmma
  if (arch == 80) return {2048, 128, 128, 40, 11};
  return {1024, 256, 128, 24, 4};  // GDDR instead of HBM
}

namespace gemm_detail {

constexpr double max(double a, double b) { return a > b ? a : b; }
constexpr double min(double a, double b) { return a < b ? a : b; }

constexpr double ceil(double x) {
  const auto whole = static_cast<int64_t>(x);
  return static_cast<double>(whole) + (static_cast<double>(whole) < x ? 1 : 0);
}

constexpr double kTileClocks = 600;  // of filling the pipeline that no other block hides
constexpr double kNotOverlapped = 0.2;
constexpr double kMargin = 0.03;

}  // namespace gemm_detail

// Clocks of an SM for one stage of a tile: the slowest of multiplying, shared memory and L2.
constexpr double gemm_stage_clocks(const GemmTile& tile, const SmRates& rate) {
  const double flops = 2.0 * tile.m * tile.n * tile.k;
  const double filled = 1.0 * (tile.m + tile.n) * tile.k * tile.element_bytes;
  const double read = flops / 2 * tile.element_bytes * (1.0 / tile.warp_m() + 1.0 / tile.warp_n());
  const double math = flops / (tile.element_bytes == 4 ? rate.flops32 : rate.flops);
  return gemm_detail::max(
      math, gemm_detail::max((filled + read) / rate.shared_bytes, filled / rate.l2_bytes));
}

// Expected clocks of a product, from sizes alone: the host does not know how many rows each expert
// has. Rows are taken as spread evenly, so that an expert's last tile is half full on average. The
// greater of two times counts, and the part of the other that overlap leaves: DRAM's, which is the
// same for all tiles, and that of the SMs, in which operands come from L2 once per tile and the
// last wave is not full.
constexpr double gemm_clocks(const GemmTile& tile, const GemmProblem& p, const GpuFacts& gpu) {
  using namespace gemm_detail;
  const SmRates rate = sm_rates(gpu.arch);
  const auto rows = static_cast<double>(p.rows), n = static_cast<double>(p.n);
  const auto k = static_cast<double>(p.k);
  const double active = min(static_cast<double>(p.experts), rows);
  if (active == 0 || n == 0 || k == 0) return 0;
  const double each = rows / active;  // of an expert that has any

  const bool wgrad = p.kind == GemmKind::kWgrad;
  const double tiles = wgrad ? active * ceil(n / tile.m) * ceil(k / tile.n)
                             : active * max(1, each / tile.m + 0.5) * ceil(n / tile.n);
  const double steps = wgrad ? max(1, each / tile.k + 0.5) : ceil(k / tile.k);

  const double store = 1.0 * tile.m * tile.n * tile.element_bytes / rate.l2_bytes;
  const double sm_clocks =
      ceil(tiles / gpu.sms) * (steps * gemm_stage_clocks(tile, rate) + store + kTileClocks);

  const double weights = active * n * k, activations = rows * (n + k);
  const double dram_clocks =
      (weights + activations) * tile.element_bytes / (rate.dram_bytes * gpu.sms);
  return max(sm_clocks, dram_clocks) + kNotOverlapped * min(sm_clocks, dram_clocks);
}

constexpr bool gemm_tile_fits(const GemmTile& tile, const GemmProblem& p, const GpuFacts& gpu) {
  return tile.has(p.kind) && tile.element_bytes == p.element_bytes &&
         tile.shared_bytes() + kGemmScheduleBytes <= gpu.shared_bytes;
}

// The index of the tile to run `p` with, or kAutoTile if none fits. A greater tile has to be at
// least kMargin faster: smaller ones lose less where rows are spread unevenly.
constexpr int choose_gemm_tile(const GemmProblem& p, const GpuFacts& gpu) {
  if (!p.vector && p.element_bytes == kGemmTiles[kSlowPathTile].element_bytes) {
    return gemm_tile_fits(kGemmTiles[kSlowPathTile], p, gpu) ? kSlowPathTile : kAutoTile;
  }
  using gemm_detail::kMargin;
  int best = kAutoTile;
  double best_clocks = 0;
  for (int i = 0; i < kTileCount; ++i) {
    if (!gemm_tile_fits(kGemmTiles[i], p, gpu)) continue;
    const double clocks = gemm_clocks(kGemmTiles[i], p, gpu);
    if (best == kAutoTile || clocks < (1 - kMargin) * best_clocks) {
      best = i;
      best_clocks = clocks;
    }
  }
  return best;
}

}  // namespace unipool
