// SPDX-License-Identifier: Apache-2.0
// The expert MLP, backward: two products over the rows of all experts.
//   hidden_bwd   gathers tokens' gradients, product with down_proj, and on the way out the gradient
//                of SwiGLU, the activations times the router's weight (for the gradient of
//                down_proj), and the gradient of the weight in parts, one per tile of columns
//   sum_parts    adds these parts in the order of the columns
//   input_bwd    the gradient of the pre-activations times gate_up_proj (expert_mlp.cuh)
//
// Tiles, barriers and schedule are those of the forward pass (expert_mlp.cu); matrices are read
// across their rows. hidden_bwd stages its sums as float32, since they are rounded once, after the
// router's weight is applied. The gradient of the pre-activations may be written over them.
//
// Shared memory: the pipeline (64 to 80 KiB) or the staged float32 tile, 4 (M + 6) bytes of
// schedule, 4 bytes per row of slots. Occupancy: 2 blocks of 128 threads per multiprocessor, 3 for
// small tiles. Traffic: the matrices once, 6 D F bytes per expert with rows in 16 bits; the tokens'
// gradients 2 T D, pre-activations and their gradient 12 N F, hidden 2 N F, parts 8 N per tile of
// columns; the output as in the forward pass.
#include "cuda/device/gemm/swiglu.cuh"
#include "cuda/expert_mlp.cuh"

namespace unipool {
namespace {

// The gradients of one chunk of a row: of the stored pre-activations `gates` and `ups`, under g
// times the router's weight. Adds <g, a> to `dot`.
template <class T>
struct ChunkBwd {
  Chunk<T> gate, up, hidden;

  __device__ __forceinline__ ChunkBwd(const Chunk<T>& gates, const Chunk<T>& ups, const float* g,
                                      float weight, float& dot) {
    constexpr int kChunk = kChunkOf<T>;
    float by_gate[kChunk], by_up[kChunk], value[kChunk];
    gates.unpack(by_gate);
    ups.unpack(by_up);
#pragma unroll
    for (int i = 0; i < kChunk; ++i) {
      const SwigluBwd bwd = swiglu_bwd<T>(by_gate[i], by_up[i]);
      dot += g[i] * bwd.value;
      by_gate[i] = weight * g[i] * bwd.by_gate;
      by_up[i] = weight * g[i] * bwd.by_up;
      value[i] = weight * bwd.value;
    }
    gate = Chunk<T>::pack(by_gate);
    up = Chunk<T>::pack(by_up);
    hidden = Chunk<T>::pack(value);
  }
};

// A tile of g, staged as float32, turned into gradients. kLanes threads work on a row, a chunk
// each, kBatch rows at a time so that their pre-activations are on the way together. preact may be
// grad_preact: a thread has read a chunk before it writes it, and no other thread does either.
template <class Tile, bool kVector, class Staged>
__device__ __forceinline__ void store_gradients(const Staged& staged,
                                                const ExpertHiddenBwdArgs& args,
                                                const RowTile& tile, const int32_t* slots) {
  using T = typename Tile::T;
  constexpr int kChunk = kChunkOf<T>, kLanes = Tile::kN / kChunk;
  constexpr int kRowStep = Tile::kThreads / kLanes, kEach = Tile::kM / kRowStep;
  constexpr int kBatch = std::min(kEach, 4);
  static_assert(kWarp % kLanes == 0 && kEach % kBatch == 0);
  const int lane = threadIdx.x % kLanes, column = tile.column + lane * kChunk;
  const int left = int(args.d_ff) - column;
  float* parts = static_cast<float*>(args.workspace) + tile.column / Tile::kN * args.rows;

#pragma unroll 1
  for (int first = threadIdx.x / kLanes; first < Tile::kM; first += kBatch * kRowStep) {
    Chunk<T> gates[kBatch], ups[kBatch];
#pragma unroll
    for (int b = 0; b < kBatch; ++b) {
      const int row = first + b * kRowStep;
      const bool used = slots[row] >= 0 && left > 0;
      const T* preact =
          static_cast<const T*>(args.preact) + (int64_t(tile.row) + row) * 2 * args.d_ff + column;
      gates[b] = used ? load_once<kVector>(preact, left) : Chunk<T>::zero();
      ups[b] = used ? load_once<kVector>(preact + args.d_ff, left) : Chunk<T>::zero();
    }
#pragma unroll
    for (int b = 0; b < kBatch; ++b) {
      const int row = first + b * kRowStep, slot = slots[row];
      const float weight = slot >= 0 ? __ldg(args.weights + slot) : 0.f;
      const float* from = staged.data + row * Staged::kStride + lane * kChunk;
      float g[kChunk];
#pragma unroll
      for (int i = 0; i < kChunk; i += kChunkOf<float>) shared_chunk(from + i).unpack(g + i);
#pragma unroll
      for (int i = 0; i < kChunk; ++i) g[i] = slot >= 0 && i < left ? g[i] : 0.f;
      float dot = 0.f;
      const ChunkBwd<T> bwd(gates[b], ups[b], g, weight, dot);
      if (row < tile.rows && left > 0) {
        const int64_t to = (int64_t(tile.row) + row) * args.d_ff + column;
        T* grad_preact = static_cast<T*>(args.grad_preact) + 2 * to - column;
        store_chunk<kVector>(bwd.gate, grad_preact, left);
        store_chunk<kVector>(bwd.up, grad_preact + args.d_ff, left);
        store_chunk<kVector>(bwd.hidden, static_cast<T*>(args.hidden) + to, left);
      }
      dot = group_sum<kLanes>(dot);
      if (lane == 0 && row < tile.rows) parts[tile.row + row] = dot;
    }
  }
}

// Reads down of each expert with rows from DRAM once, the tokens' gradients once per column of
// tiles (mostly from L2) and preact once; writes every row of grad_preact and hidden.
template <class Tile, bool kVector>
__global__ __launch_bounds__(Tile::kThreads) void expert_hidden_bwd_kernel(
    const __grid_constant__ ExpertHiddenBwdArgs args) {
  using T = typename Tile::T;
  using Shared = RowsShared<Tile, float>;
  using LinesA = GatheredLines<typename Tile::A>;
  using LinesB = StridedLines<typename Tile::B>;
  __shared__ int32_t slots[Tile::kM];
  auto* shared = dynamic_shared<unsigned char>();
  T* smem = reinterpret_cast<T*>(shared);
  const int depth = int(args.d_model), width = int(args.d_ff);

  RowSchedule<Tile> schedule(reinterpret_cast<int32_t*>(shared + Shared::kTileBytes), args.offsets,
                             args.experts, args.rows, width);
  RowTile tile;
  while (schedule.next(tile)) {
    find_slots<Tile>(slots, tile, args.order, args.rows, args.experts);
    const T* down = static_cast<const T*>(args.down) + int64_t(tile.expert) * depth * width;
    const LinesA rows(tile.rows, [&](int row) {
      const int slot = checked_index(args.order, tile.row + row, args.rows);
      return token_row(static_cast<const T*>(args.grad), slot, args.top_k, depth);
    });
    Loader<typename Tile::A, LinesA, kVector> load_a(smem, rows, tile.rows, depth);
    Loader<typename Tile::B, LinesB, kVector> load_b(smem + Tile::kElementsA,
                                                     LinesB::matrix(down + tile.column, width),
                                                     depth, width - tile.column);
    auto acc = Tile::zeros();
    const bool tail = tile.expert == args.experts;
    multiply<Tile>(smem, load_a, load_b, tail ? 0 : ceil_div(depth, Tile::kK), acc);

    const typename Shared::Staged staged{reinterpret_cast<float*>(shared)};
    stage_tile<Tile>(staged, acc, [](int, float v) { return v; });
    store_gradients<Tile, kVector>(staged, args, tile, slots);
    __syncthreads();
  }
}

template <class Tile, bool kVector>
struct ExpertHiddenBwd {
  using Shared = RowsShared<Tile, float>;
  static constexpr auto kKernel = expert_hidden_bwd_kernel<Tile, kVector>;
};

// --- the gradient of the router's weights

constexpr int kSumThreads = 256;

// grad_weights[order[r]] = the sum of row r's parts, in the order of the columns; 0 for slots
// without a row. parts [tiles, rows]; reads each once. There are as many rows as slots: a thread
// sees to one of each.
__global__ __launch_bounds__(kSumThreads) void sum_parts_kernel(const float* parts, int tiles,
                                                                const int32_t* order,
                                                                const int32_t* inverse,
                                                                const int32_t* rows_used,
                                                                float* grad_weights, int64_t rows) {
  const int64_t row = int64_t(blockIdx.x) * kSumThreads + threadIdx.x;
  if (row >= rows) return;
  const int slot = checked_index(order, row, rows);
  if (row < __ldg(rows_used) && slot >= 0) {
    float sum = 0.f;
    for (int t = 0; t < tiles; ++t) sum += __ldg(parts + t * rows + row);
    grad_weights[slot] = sum;
  }
  if (checked_index(inverse, row, rows) < 0) grad_weights[row] = 0.f;
}

constexpr int least_columns() {
  int least = kGemmTiles[0].n;
  for (const GemmTile& tile : kGemmTiles) least = std::min(least, tile.n);
  return least;
}

}  // namespace

size_t expert_hidden_bwd_workspace_bytes(int64_t rows, int64_t d_ff) {
  return size_t(rows) * ceil_div(d_ff, int64_t(least_columns())) * sizeof(float);
}

cudaError_t launch_expert_hidden_bwd(const ExpertHiddenBwdArgs& args, cudaStream_t stream) {
  const int64_t size = size_of(args.dtype), in = args.d_model * size, out = args.d_ff * size;
  const bool vector = is_aligned(args.grad, in) && is_aligned(args.down, out) &&
                      is_aligned(args.preact, out) && is_aligned(args.grad_preact, out) &&
                      is_aligned(args.hidden, out);
  int tile;
  cudaError_t error = rows_tile(args, GemmKind::kRowsBwd, args.d_ff, args.d_model, vector, &tile);
  if (error != cudaSuccess || args.rows == 0) return error;
  error = launch_rows<ExpertHiddenBwd, Major::kMn>(args, tile, args.d_ff, vector, stream);
  if (error != cudaSuccess) return error;
  return launch(sum_parts_kernel, dim3(unsigned(ceil_div(args.rows, int64_t(kSumThreads)))),
                dim3(kSumThreads), 0, stream, static_cast<const float*>(args.workspace),
                int(ceil_div(args.d_ff, int64_t(kGemmTiles[tile].n))), args.order, args.inverse,
                args.offsets + args.experts, args.grad_weights, args.rows);
}

cudaError_t launch_expert_input_bwd(const ExpertInputBwdArgs& args, cudaStream_t stream) {
  return launch_to_tokens<Major::kMn>(
      {args.grad_preact, args.gate_up, nullptr, args.order, args.inverse, args.offsets, args.out,
       args.rows, 2 * args.d_ff, args.d_model, args.experts, args.top_k, args.dtype, args.tile},
      stream);
}

}  // namespace unipool
