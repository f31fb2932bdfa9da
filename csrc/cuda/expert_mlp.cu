// SPDX-License-Identifier: Apache-2.0
// The expert MLP, forward: two products over the rows of all experts.
//   up     gathers tokens' rows, gate and up projection in one product, SwiGLU on the way out
//   down   the second projection times the router's weight (expert_mlp.cuh)
//
// A persistent block walks over tiles that it finds from the plan's offsets (gemm/schedule.cuh).
// For each it finds the rows' slots, runs the pipeline over K (gemm/mainloop.cuh), turns its sums
// round in shared memory and stores them 16 bytes per thread.
//
// Barriers: one per k tile, three more per tile (sums staged, staged sums complete, shared memory
// free again), two per block for the schedule. Shared memory: the pipeline, 64 to 80 KiB, in which
// outputs are staged; 4 (M + 6) bytes of schedule; 4 bytes per row of slots, and of factors (down).
// Occupancy: 2 or 3 blocks of 128 threads per multiprocessor.
// Traffic: the matrices of experts with rows once, 6 D F bytes each in 16 bits; of tokens and
// hidden 2 T D + 4 N F, and 4 N F more for the pre-activations that a backward needs; the output 2
// T D, or 2 N D and the sum of k rows by unpermute.
#include "cuda/device/gemm/swiglu.cuh"
#include "cuda/expert_mlp.cuh"

namespace unipool {
namespace {

// The B operand of a tile takes kGroup rows of gate_proj and kGroup of up_proj in turn, so that a
// tile of kN columns holds both pre-activations of kN / 2 columns of hidden.
constexpr int kGroup = 8;

// The lines of gate_up[e] from row `first` of each half on, as B takes them.
template <class Tile, bool kVector>
__device__ __forceinline__ auto gate_up_loader(typename Tile::T* smem,
                                               const typename Tile::T* gate_up, int first,
                                               int64_t d_ff, int64_t d_model) {
  using B = typename Tile::B;
  using Lines = StridedLines<B>;
  constexpr int kRowStep = B::kStep / 2;  // rows of one half between two lines of a thread
  static_assert(B::kStep % (2 * kGroup) == 0);
  const int line = B::line(), row = first + line / (2 * kGroup) * kGroup + line % kGroup;
  const int64_t half = line % (2 * kGroup) < kGroup ? 0 : d_ff;
  const Lines lines{gate_up + (half + row) * d_model + B::column(), kRowStep * d_model, B::kDepth};
  return Loader<B, Lines, kVector>(smem + Tile::kElementsA, lines, int(d_ff) - row, kRowStep,
                                   int(d_model));
}

// Stores the tile's part of hidden, and of preact if it is kept. Pre-activations are rounded before
// they are used, so that the backward pass finds what the forward pass has seen.
template <class Tile, bool kVector, class Staged>
__device__ __forceinline__ void store_hidden(const Staged& staged, const ExpertUpArgs& args,
                                             const RowTile& tile, const int32_t* slots) {
  using T = typename Tile::T;
  constexpr int kChunk = kChunkOf<T>, kChunks = Tile::kN / 2 / kChunk;
  static_assert(kGroup % kChunk == 0 && Tile::kM * kChunks % Tile::kThreads == 0);
  const int first = tile.column / 2;
#pragma unroll 2
  for (int i = 0; i < Tile::kM * kChunks / Tile::kThreads; ++i) {
    const int at = threadIdx.x + i * Tile::kThreads, row = at / kChunks;
    const int column = at % kChunks * kChunk;
    const int64_t left = args.d_ff - first - column;
    if (row >= tile.rows || left <= 0) continue;
    const T* from = staged.data + row * Staged::kStride + column / kGroup * 2 * kGroup;
    from += column % kGroup;
    const bool used = slots[row] >= 0;
    const Chunk<T> gates = used ? shared_chunk(from) : Chunk<T>::zero();
    const Chunk<T> ups = used ? shared_chunk(from + kGroup) : Chunk<T>::zero();
    float gate[kChunk], up[kChunk];
    gates.unpack(gate);
    ups.unpack(up);
#pragma unroll
    for (int j = 0; j < kChunk; ++j) up[j] = swiglu<T>(gate[j], up[j]);

    const int64_t to = (int64_t(tile.row) + row) * args.d_ff + first + column;
    store_chunk<kVector>(Chunk<T>::pack(up), static_cast<T*>(args.hidden) + to, int(left));
    if (args.preact == nullptr) continue;
    T* preact = static_cast<T*>(args.preact) + to + (int64_t(tile.row) + row) * args.d_ff;
    store_chunk<kVector>(gates, preact, int(left));
    store_chunk<kVector>(ups, preact + args.d_ff, int(left));
  }
}

// Reads gate_up of each expert with rows from DRAM once, and the tokens' rows once per column of
// tiles (mostly from L2); writes every row of hidden and preact.
template <class Tile, bool kVector>
__global__ __launch_bounds__(Tile::kThreads) void expert_up_kernel(
    const __grid_constant__ ExpertUpArgs args) {
  using T = typename Tile::T;
  using Shared = RowsShared<Tile, T>;
  using LinesA = GatheredLines<typename Tile::A>;
  __shared__ int32_t slots[Tile::kM];
  auto* shared = dynamic_shared<unsigned char>();
  T* smem = reinterpret_cast<T*>(shared);
  const int depth = int(args.d_model);

  RowSchedule<Tile> schedule(reinterpret_cast<int32_t*>(shared + Shared::kTileBytes), args.offsets,
                             args.experts, args.rows, 2 * args.d_ff);
  RowTile tile;
  while (schedule.next(tile)) {
    find_slots<Tile>(slots, tile, args.order, args.rows, args.experts);
    const T* gate_up = static_cast<const T*>(args.gate_up) + tile.expert * 2 * args.d_ff * depth;
    const LinesA rows(tile.rows, [&](int row) {
      const int slot = checked_index(args.order, tile.row + row, args.rows);
      return token_row(static_cast<const T*>(args.x), slot, args.top_k, depth);
    });
    Loader<typename Tile::A, LinesA, kVector> load_a(smem, rows, tile.rows, depth);
    auto load_b = gate_up_loader<Tile, kVector>(smem, gate_up, tile.column / 2, args.d_ff, depth);
    auto acc = Tile::zeros();
    const bool tail = tile.expert == args.experts;
    multiply<Tile>(smem, load_a, load_b, tail ? 0 : ceil_div(depth, Tile::kK), acc);

    const typename Shared::Staged staged{smem};
    stage_tile<Tile>(staged, acc, [](int, float v) { return v; });
    store_hidden<Tile, kVector>(staged, args, tile, slots);
    __syncthreads();
  }
}

template <class Tile, bool kVector>
struct ExpertUp {
  using Shared = RowsShared<Tile, typename Tile::T>;
  static constexpr auto kKernel = expert_up_kernel<Tile, kVector>;
};

}  // namespace

cudaError_t launch_expert_up(const ExpertUpArgs& args, cudaStream_t stream) {
  const int64_t size = size_of(args.dtype), in = args.d_model * size, out = args.d_ff * size;
  const bool vector = is_aligned(args.x, in) && is_aligned(args.gate_up, in) &&
                      is_aligned(args.preact, out) && is_aligned(args.hidden, out);
  const int64_t columns = 2 * args.d_ff;
  int tile;
  const cudaError_t error = rows_tile(args, GemmKind::kRows, columns, args.d_model, vector, &tile);
  if (error != cudaSuccess) return error;
  return launch_rows<ExpertUp, Major::kK>(args, tile, columns, vector, stream);
}

cudaError_t launch_expert_down(const ExpertDownArgs& args, cudaStream_t stream) {
  return launch_to_tokens<Major::kK>(
      {args.hidden, args.down, args.weights, args.order, args.inverse, args.offsets, args.out,
       args.rows, args.d_ff, args.d_model, args.experts, args.top_k, args.dtype, args.tile},
      stream);
}

}  // namespace unipool
