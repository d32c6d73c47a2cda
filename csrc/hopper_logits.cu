// Tiles of logits on Hopper (sm_90a): hidden [T, D] times weight [V, D], whose fp32 accumulators become statistics,
// exponentials or gradients without leaving the chip. It stands in for the Triton kernels linear_stats_fwd_kernel and
// slice_grad_kernel (dpo_kernels/kernels), with the same partial results in the same places.
//
// A block computes 128 rows by 256 columns: one warp loads (TMA, four stages), two groups of four warps multiply
// (wgmma, 64 rows each, 128 accumulators a thread) and turn the accumulators into results. Two blocks of a cluster
// share the columns: each loads half of them for both. Blocks stay and take one tile after another.
//
// Compiled with HALF (0 for bfloat16, 1 for float16) and MODE (STATS, EXPS, GRADIENT). Needs no header but its own.

typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

#define STATS 0
#define EXPS 1
#define GRADIENT 2

constexpr int ROWS = 128;
constexpr int COLS = 256;
constexpr int DEPTH = 64;
constexpr int STAGES = 4;
constexpr int CLUSTER = 2;
constexpr u32 ROW_BYTES = ROWS * DEPTH * 2;
constexpr u32 COL_BYTES = COLS * DEPTH * 2;
// Bytes that two neighbours each load for both.
constexpr u32 SHARE_BYTES = COL_BYTES / CLUSTER;
constexpr int ACCUMULATORS = 128;

#include "hopper_machine.cuh"
// Uses its names.
#include "hopper_epilogue.cuh"

struct Tile {
  int row, col;
};

// Row tiles of a group pass over the columns together.
__device__ __forceinline__ Tile locate(const Args& args, int tile, int tiles_of_rows, int tiles_of_cols) {
  const int in_group = args.group * tiles_of_cols;
  const int first = tile / in_group * args.group;
  const int size = min(tiles_of_rows - first, args.group);
  const int inside = tile % in_group;
  return {(first + inside % size) * ROWS * CLUSTER, inside / size * COLS};
}

extern "C" __global__ void __cluster_dims__(CLUSTER, 1, 1) __launch_bounds__(384, 1)
    hopper_logits_kernel(const __grid_constant__ TensorMap hidden, const __grid_constant__ TensorMap weight,
                         const __grid_constant__ Args args) {
  extern __shared__ char memory[];
  const u32 start = (shared_address(memory) + 1023) & ~1023u;
  const u32 row_tiles = start, col_tiles = start + STAGES * ROW_BYTES;
  const u32 full = col_tiles + STAGES * COL_BYTES, empty = full + 8 * STAGES;
  const int group = threadIdx.x / 128;
  const u32 rank = block_of_cluster();
  if (threadIdx.x == 0) {
    for (int i = 0; i < STAGES; ++i) {
      init_barrier(full + 8 * i, 1);
      init_barrier(empty + 8 * i, 2 * CLUSTER);
    }
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  }
  sync_cluster();

  const int tiles_of_rows = (args.T + ROWS * CLUSTER - 1) / (ROWS * CLUSTER);
  const int tiles_of_cols = (args.V + COLS - 1) / COLS;
  const int tiles = tiles_of_rows * tiles_of_cols, steps = (args.D + DEPTH - 1) / DEPTH;
  const int clusters = gridDim.x / CLUSTER;
  int stage = 0;
  u32 phase = 0;
  if (group == 0) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 24;");
    if (threadIdx.x == 0) {
      for (int tile = blockIdx.x / CLUSTER; tile < tiles; tile += clusters) {
        const Tile place = locate(args, tile, tiles_of_rows, tiles_of_cols);
        const int row = place.row + rank * ROWS, col = place.col + rank * (COLS / CLUSTER);
        for (int step = 0; step < steps; ++step) {
          wait_barrier(empty + 8 * stage, phase ^ 1);
          const u32 barrier = full + 8 * stage;
          expect_bytes(barrier, ROW_BYTES + COL_BYTES);
          load_tile(row_tiles + stage * ROW_BYTES, &hidden, barrier, step * DEPTH, row);
          load_tile_for_all(col_tiles + stage * COL_BYTES + rank * SHARE_BYTES, &weight, barrier, step * DEPTH, col);
          if (++stage == STAGES) stage = 0, phase ^= 1;
        }
      }
    }
  } else {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 240;");
    const int thread = threadIdx.x % 128, quarter = thread % 4;
    const int own_rows = 64 * (group - 1);
    float d[ACCUMULATORS];
    for (int tile = blockIdx.x / CLUSTER; tile < tiles; tile += clusters) {
      const Tile place = locate(args, tile, tiles_of_rows, tiles_of_cols);
      const Rows rows = read_rows(args, place.row + rank * ROWS + own_rows + thread / 32 * 16 + thread % 32 / 4);
      int last = -1;
      for (int step = 0; step < steps; ++step) {
        wait_barrier(full + 8 * stage, phase);
        const u64 a = describe(row_tiles + stage * ROW_BYTES + own_rows * DEPTH * 2);
        const u64 b = describe(col_tiles + stage * COL_BYTES);
        begin_products();
#pragma unroll
        for (int i = 0; i < DEPTH / 16; ++i) multiply(d, a + 2 * i, b + 2 * i, step + i);
        commit_products();
        wait_products<1>();
        if (last >= 0 && thread < CLUSTER) arrive_at(empty + 8 * last, thread);
        last = stage;
        if (++stage == STAGES) stage = 0, phase ^= 1;
      }
      wait_products<0>();
      take(d);
      if (thread < CLUSTER) arrive_at(empty + 8 * last, thread);
      finish(d, args, rows, place.col, quarter);
    }
  }
  // A neighbour may still send to this block's memory, or arrive there.
  sync_cluster();
}
