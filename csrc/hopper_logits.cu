// Tiles of logits on Hopper (sm_90a): hidden [T, D] times weight [V, D], whose fp32 accumulators become statistics,
// exponentials or gradients without leaving the chip. It stands in for the Triton kernels linear_stats_fwd_kernel and
// slice_grad_kernel (dpo_kernels/kernels), with the same partial results in the same places.
//
// A block computes 128 rows by 256 columns: one warp loads (TMA, four stages), two groups of four warps multiply
// (wgmma, 64 rows each, 128 accumulators a thread) and turn the accumulators into results. Two blocks of a cluster
// share the columns: each loads half of them for both. Blocks stay and take one tile after another.
//
// Compiled with HALF (0 for bfloat16, 1 for float16) and MODE (STATS, EXPS, GRADIENT). Needs no header.

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
constexpr float LOG2_E = 1.4426950408889634f;
constexpr int ACCUMULATORS = 128;

struct alignas(64) TensorMap {
  char bytes[128];
};

struct Args {
  const long long* labels;  // [T]
  const float* row_shift;   // [T], or null (STATS, EXPS)
  float* tile_shift;        // [J, T] (STATS, EXPS)
  float* tile_sum;          // [J, T] (STATS, EXPS)
  float* label_logit;       // [T] (STATS, EXPS)
  const double* lse;        // [T] (GRADIENT)
  const float* grad;        // [T] (GRADIENT)
  u16* out;                 // [>= T, whole tiles of columns] (EXPS, GRADIENT)
  const u16* bias;          // [V], or null
  long long out_stride;
  long long first_col;
  long long ignore_index;
  int T, V, D;
  int group;  // row tiles of a cluster that pass over the columns together, so that those stay in L2
  float scale;  // of a logit: logit_scale / temperature
  float shift_slack;
};

__device__ __forceinline__ float infinity() { return __int_as_float(0x7f800000); }

// ---------------------------------------------------------------- barriers and copies

__device__ __forceinline__ u32 shared_address(const void* pointer) {
  return static_cast<u32>(__cvta_generic_to_shared(pointer));
}

__device__ __forceinline__ void init_barrier(u32 barrier, u32 arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals));
}

__device__ __forceinline__ void wait_barrier(u32 barrier, u32 parity) {
  asm volatile(
      "{\n.reg .pred done;\n"
      "again:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@!done bra again;\n}" ::"r"(barrier),
      "r"(parity)
      : "memory");
}

__device__ __forceinline__ void expect_bytes(u32 barrier, u32 bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}

// Arrive at the barrier in the same place of a block of the cluster.
__device__ __forceinline__ void arrive_at(u32 barrier, u32 block) {
  asm volatile(
      "{\n.reg .b32 remote;\n"
      "mapa.shared::cluster.u32 remote, %0, %1;\n"
      "mbarrier.arrive.shared::cluster.b64 _, [remote];\n}" ::"r"(barrier),
      "r"(block)
      : "memory");
}

__device__ __forceinline__ void load_tile(u32 target, const TensorMap* map, u32 barrier, int depth, int row) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4}], [%2];" ::"r"(
          target),
      "l"(map), "r"(barrier), "r"(depth), "r"(row)
      : "memory");
}

__device__ __forceinline__ void load_tile_for_all(u32 target, const TensorMap* map, u32 barrier, int depth, int row) {
  const u16 mask = (1 << CLUSTER) - 1;
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster"
      " [%0], [%1, {%3, %4}], [%2], %5;" ::"r"(target),
      "l"(map), "r"(barrier), "r"(depth), "r"(row), "h"(mask)
      : "memory");
}

__device__ __forceinline__ u32 block_of_cluster() {
  u32 rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}

__device__ __forceinline__ void sync_cluster() {
  asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}

// ---------------------------------------------------------------- products

// Rows of 128 bytes, swizzled in groups of 8 rows, which are 1024 bytes apart.
__device__ __forceinline__ u64 describe(u32 address) {
  return (u64)((address & 0x3ffff) >> 4) | (1ull << 16) | (64ull << 32) | (1ull << 62);
}

#define F4(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define F16(i) F4(i), F4(i + 4), F4(i + 8), F4(i + 12)
#if HALF
#define OPERANDS "f16.f16"
#else
#define OPERANDS "bf16.bf16"
#endif

// d += rows [64, 16] @ columns [256, 16]^T, or without the old d.
__device__ __forceinline__ void multiply(float (&d)[ACCUMULATORS], u64 rows, u64 cols, int keep) {
  asm volatile(
      "{\n.reg .pred keep;\nsetp.ne.b32 keep, %130, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n256k16.f32." OPERANDS
      " {"
      "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
      "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
      "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "
      "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, "
      "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, "
      "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, "
      "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, "
      "%112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"
      "}, %128, %129, keep, 1, 1, 0, 0;\n}"
      : F16(0), F16(16), F16(32), F16(48), F16(64), F16(80), F16(96), F16(112)
      : "l"(rows), "l"(cols), "r"(keep));
}

__device__ __forceinline__ void begin_products() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void commit_products() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int LEFT>
__device__ __forceinline__ void wait_products() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(LEFT) : "memory");
}

// Until here the products write the accumulators; no use of them may move ahead of it.
__device__ __forceinline__ void take(float (&d)[ACCUMULATORS]) {
  asm volatile("" : F16(0), F16(16), F16(32), F16(48), F16(64), F16(80), F16(96), F16(112)::"memory");
}

// ---------------------------------------------------------------- what becomes of accumulators

__device__ __forceinline__ float power_of_2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

__device__ __forceinline__ float widen(u16 bits) {
#if HALF
  float y;
  asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(bits));
  return y;
#else
  return __uint_as_float((u32)bits << 16);
#endif
}

__device__ __forceinline__ u32 pack(float first, float second) {
  u32 both;
#if HALF
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(second), "f"(first));
#else
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(second), "f"(first));
#endif
  return both;
}

// The four threads that share a row.
__device__ __forceinline__ float max_of_row(float x) {
  x = fmaxf(x, __shfl_xor_sync(~0u, x, 1));
  return fmaxf(x, __shfl_xor_sync(~0u, x, 2));
}

__device__ __forceinline__ float sum_of_row(float x) {
  x += __shfl_xor_sync(~0u, x, 1);
  return x + __shfl_xor_sync(~0u, x, 2);
}

// Of 32 columns each of a row's four threads has four pairs, 8 columns apart; afterwards 8 that are next to each other.
__device__ __forceinline__ void exchange(u32 (&w)[4], int quarter) {
  const bool odd = quarter & 1, upper = quarter & 2;
#pragma unroll
  for (int i = 0; i < 4; i += 2) {
    const u32 got = __shfl_xor_sync(~0u, odd ? w[i] : w[i + 1], 1);
    if (odd) w[i] = got; else w[i + 1] = got;
  }
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const u32 got = __shfl_xor_sync(~0u, upper ? w[i] : w[i + 2], 2);
    if (upper) w[i] = got; else w[i + 2] = got;
  }
}

__device__ __forceinline__ void store_row(u16* target, const float (&d)[ACCUMULATORS], int row, int quarter, bool inside) {
#pragma unroll
  for (int block = 0; block < COLS / 32; ++block) {
    u32 w[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) w[i] = pack(d[16 * block + 4 * i + 2 * row], d[16 * block + 4 * i + 2 * row + 1]);
    exchange(w, quarter);
    if (inside)
      asm volatile("st.global.cs.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(target + 32 * block + 8 * quarter), "r"(w[0]),
                   "r"(w[1]), "r"(w[2]), "r"(w[3])
                   : "memory");
  }
}

// Column of a label in this slice, or -1 where it is in none of its columns.
__device__ __forceinline__ int local_label(const Args& args, long long label) {
  const long long col = label - args.first_col;
  return col >= 0 && col < args.V ? (int)col : -1;
}

// Logits in place: scaled products with bias; -inf beyond the last column.
__device__ __forceinline__ void to_logits(float (&d)[ACCUMULATORS], const Args& args, int col_start, int quarter) {
  if (args.bias != nullptr) {
#pragma unroll
    for (int j = 0; j < COLS / 8; ++j)
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int col = col_start + 8 * j + 2 * quarter + i;
        const float bias = col < args.V ? widen(args.bias[col]) : 0.0f;
        d[4 * j + i] += bias;
        d[4 * j + 2 + i] += bias;
      }
  }
  if (args.scale != 1.0f) {
#pragma unroll
    for (int i = 0; i < ACCUMULATORS; ++i) d[i] *= args.scale;
  }
  if (col_start + COLS > args.V) {
#pragma unroll
    for (int i = 0; i < ACCUMULATORS; ++i)
      if (col_start + 8 * (i / 4) + 2 * quarter + i % 2 >= args.V) d[i] = -infinity();
  }
}

struct Rows {
  int row[2];
  int label[2];  // column in this slice, or -1
  float first[2];   // STATS, EXPS: shift of the row; GRADIENT: gradient of its log-prob
  float high[2], low[2];  // GRADIENT: log-sum-exp, the second part in powers of 2
  bool used[2];
};

__device__ __forceinline__ Rows read_rows(const Args& args, int first_row) {
  Rows rows;
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int row = rows.row[r] = first_row + 8 * r;
    const bool inside = row < args.T;
    const long long label = inside ? args.labels[row] : args.ignore_index;
    rows.used[r] = label != args.ignore_index;
    rows.label[r] = inside ? local_label(args, label) : -1;
    rows.first[r] = rows.high[r] = rows.low[r] = 0.0f;
#if MODE == GRADIENT
    if (rows.used[r]) {
      const double lse = args.lse[row];
      rows.high[r] = (float)lse;
      rows.low[r] = (float)(lse - rows.high[r]) * LOG2_E;
      rows.first[r] = args.grad[row] * args.scale;
    }
#else
    if (args.row_shift != nullptr && inside) rows.first[r] = args.row_shift[row];
#endif
  }
  return rows;
}

__device__ __forceinline__ bool in_tile(int label, int col_start) { return label >= col_start && label < col_start + COLS; }

#if MODE == GRADIENT
__device__ __forceinline__ void finish(float (&d)[ACCUMULATORS], const Args& args, const Rows& rows, int col_start, int quarter) {
  to_logits(d, args, col_start, quarter);
#pragma unroll
  for (int i = 0; i < ACCUMULATORS; ++i) {
    const int r = i % 4 / 2;
    d[i] = power_of_2((d[i] - rows.high[r]) * LOG2_E - rows.low[r]);
  }
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const bool unusual = !rows.used[r] || in_tile(rows.label[r], col_start) || col_start + COLS > args.V;
    const float factor = rows.first[r];
#pragma unroll
    for (int j = 0; j < COLS / 8; ++j)
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        float& x = d[4 * j + 2 * r + i];
        if (unusual) {
          const int col = col_start + 8 * j + 2 * quarter + i;
          x = col == rows.label[r] ? (1.0f - x) * factor : -x * factor;
          // An ignored row is 0 even where its hidden state is not finite, and so are columns beyond the last.
          if (!rows.used[r] || col >= args.V) x = 0.0f;
        } else {
          x = -x * factor;
        }
      }
    u16* target = args.out + (long long)rows.row[r] * args.out_stride + col_start;
    store_row(target, d, r, quarter, rows.row[r] < args.T);
  }
}
#else
__device__ __forceinline__ void finish(float (&d)[ACCUMULATORS], const Args& args, const Rows& rows, int col_start, int quarter) {
  to_logits(d, args, col_start, quarter);
  // Partials of exponentials belong to whole tiles, others to halves.
  constexpr int PARTS = MODE == EXPS ? 1 : 2;
  constexpr int BLOCKS = COLS / 8 / PARTS;
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    if (in_tile(rows.label[r], col_start)) {
#pragma unroll
      for (int j = 0; j < COLS / 8; ++j)
#pragma unroll
        for (int i = 0; i < 2; ++i)
          if (col_start + 8 * j + 2 * quarter + i == rows.label[r]) {
            args.label_logit[rows.row[r]] = d[4 * j + 2 * r + i];
            d[4 * j + 2 * r + i] = -infinity();
          }
    }
#pragma unroll
    for (int part = 0; part < PARTS; ++part) {
      float shift = -infinity();
#pragma unroll
      for (int j = part * BLOCKS; j < (part + 1) * BLOCKS; ++j)
        shift = fmaxf(shift, fmaxf(d[4 * j + 2 * r], d[4 * j + 2 * r + 1]));
      shift = max_of_row(shift);
      if (args.row_shift != nullptr && shift <= rows.first[r] + args.shift_slack) shift = rows.first[r];
      // Nothing but the label, or a bias of -inf all over: the sum is 0, not exp(-inf + inf).
      const float center = shift == -infinity() ? 0.0f : shift;
      float total = 0.0f;
#pragma unroll
      for (int j = part * BLOCKS; j < (part + 1) * BLOCKS; ++j)
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          float& x = d[4 * j + 2 * r + i];
          x = power_of_2((x - center) * LOG2_E);
          total += x;
        }
      total = sum_of_row(total);
      if (quarter == 0 && rows.row[r] < args.T) {
        const long long partial = (long long)(col_start / COLS * PARTS + part) * args.T + rows.row[r];
        args.tile_shift[partial] = shift;
        args.tile_sum[partial] = total;
      }
    }
#if MODE == EXPS
    u16* target = args.out + (long long)rows.row[r] * args.out_stride + col_start;
    store_row(target, d, r, quarter, rows.row[r] < args.T);
#endif
  }
}
#endif

// ---------------------------------------------------------------- tiles

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
