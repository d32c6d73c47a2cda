// What becomes of the accumulators of a tile: statistics, exponentials or gradients, by MODE. Part of hopper_logits.cu.
// It has no instruction of Hopper's own, so that a test compiles it for threads of the CPU.

#pragma once

constexpr float LOG2_E = 1.4426950408889634f;

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
    if (inside) store_16_bytes(target + 32 * block + 8 * quarter, w);
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
