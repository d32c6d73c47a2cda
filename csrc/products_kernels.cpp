#include "products.h"

#include "tiles.h"

namespace dpo {
namespace DPO_ISA_NS {
namespace {

// b in panels [kDepth][kColumns], of which a strip stays in the first-level cache; a in blocks [kRows][kDepth].
constexpr int64_t kDepth = 256, kRows = 256, kColumns = 1024;
// One cache line more than the rows take, so that slivers do not compete for the same places in a cache.
constexpr int64_t kSliver = kDepth * kTileRows + 16;
constexpr int64_t kPanel = kDepth * (kColumns / kStrip + 1) * kStrip;
constexpr int64_t kBlock = (kRows / kTileRows + 1) * kSliver;

// Columns [column, column + count) as strips [depth][kStrip], the last one filled up with zeros.
void pack_columns(const ProductArgs& args, int64_t depth, int64_t size, int64_t column, int64_t count, float* panel) {
  const float* b = args.b + depth * args.b_depth + column * args.b_column;
  for (int64_t k = 0; k < size; ++k) {
    const float* from = b + k * args.b_depth;
    float* to = panel + k * kStrip;
    for (int64_t c = 0; c < count; c += kStrip, to += size * kStrip)
#pragma GCC unroll 4
      for (int v = 0; v < kTileVectors; ++v) {
        const int64_t at = c + v * kLanes;
        (at < count ? load_n(from + at, count - at) : Vec::zero()).store(to + v * kLanes);
      }
  }
}

// The same where the depth is contiguous.
void turn_columns(const ProductArgs& args, int64_t depth, int64_t size, int64_t column, int64_t count, float* panel) {
  const float* b = args.b + depth + column * args.b_column;
  for (int64_t c = 0; c < count; c += kLanes) {
    float* strip = panel + c / kStrip * size * kStrip + c % kStrip;
    const float* from = b + c * args.b_column;
    int64_t k = 0;
    if (c + kLanes <= count)
      for (; k + kLanes <= size; k += kLanes)
        transpose_block(from + k, args.b_column, strip + k * kStrip, kStrip);
    for (; k < size; ++k)
      for (int64_t i = 0; i < kLanes; ++i) strip[k * kStrip + i] = c + i < count ? from[i * args.b_column + k] : 0;
  }
  const int64_t padded_count = padded(count);
  for (int64_t c = padded_count; c % kStrip != 0; c += kLanes) {
    float* strip = panel + c / kStrip * size * kStrip + c % kStrip;
    for (int64_t k = 0; k < size; ++k) Vec::zero().store(strip + k * kStrip);
  }
}

// Rows [row, row + count) as slivers [depth][kTileRows], where a's rows are contiguous.
void pack_rows(const ProductArgs& args, int64_t depth, int64_t size, int64_t row, int64_t count, float* block) {
  for (int64_t k = 0; k < size; ++k) {
    const float* from = args.a + (depth + k) * args.a_depth + row;
    float* to = block + k * kTileRows;
    int64_t i = 0;
    for (; i + kTileRows <= count; i += kTileRows, to += kSliver) memcpy(to, from + i, kTileRows * sizeof(float));
    for (int64_t j = 0; i + j < count; ++j) to[j] = from[i + j];
  }
}

template <int M>
DPO_INLINE void write_tile(const Vec (&tile)[M][kTileVectors], float* to, int64_t step, int64_t columns, bool add) {
  if (columns >= kStrip) return add ? add_tile(tile, to, step) : store_tile(tile, to, step);
  for (int m = 0; m < M; ++m)
    for (int v = 0; v * kLanes < columns; ++v) {
      float* at = to + m * step + v * kLanes;
      const int64_t n = columns - v * kLanes;
      store_n(add ? load_n(at, n) + tile[m][v] : tile[m][v], at, n);
    }
}

// A block of rows times a panel.
void multiply_block(const float* a, int64_t sliver, int64_t row_step, int64_t depth_step, int64_t rows,
                    const float* panel, int64_t size, int64_t columns, float* out, int64_t out_row, bool add) {
  for (int64_t c = 0; c < columns; c += kStrip, panel += size * kStrip)
    over_rows(rows, [&](auto tile_rows, int64_t i) __attribute__((always_inline)) {
      Vec tile[decltype(tile_rows)::value][kTileVectors];
      clear_tile(tile);
      const float* from = a + i / kTileRows * sliver + i % kTileRows * row_step;
      multiply(tile, from, row_step, depth_step, panel, kStrip, size);
      write_tile(tile, out + i * out_row + c, out_row, columns - c, add);
    });
}

void product(const ProductArgs& args, const ProductTask& task, float* scratch) {
  float* panel = scratch;
  float* block = scratch + kPanel;
  const int64_t depth = task.depth_end - task.depth, parts = (depth + kDepth - 1) / kDepth;
  for (int64_t column = task.column; column < task.column_end; column += kColumns) {
    const int64_t columns = smaller(kColumns, task.column_end - column);
    for (int64_t part = 0; part < parts; ++part) {
      const int64_t begin = task.depth + depth * part / parts, size = task.depth + depth * (part + 1) / parts - begin;
      const bool add = task.accumulate || part > 0;
      (args.b_column == 1 ? pack_columns : turn_columns)(args, begin, size, column, columns, panel);
      for (int64_t row = task.row; row < task.row_end; row += kRows) {
        const int64_t rows = smaller(kRows, task.row_end - row);
        float* out = task.out + row * task.out_row + column;
        if (args.a_depth == 1) {
          const float* a = args.a + row * args.a_row + begin;
          multiply_block(a, kTileRows * args.a_row, args.a_row, 1, rows, panel, size, columns, out, task.out_row, add);
        } else {
          pack_rows(args, begin, size, row, rows, block);
          multiply_block(block, kSliver, 1, kTileRows, rows, panel, size, columns, out, task.out_row, add);
        }
      }
    }
  }
}

void add(const float* from, float* to, int64_t count) {
  for (int64_t i = 0; i < count; i += kLanes) {
    const int64_t n = smaller(kLanes, count - i);
    store_n(load_n(to + i, n) + load_n(from + i, n), to + i, n);
  }
}

}  // namespace

extern const ProductKernels product_kernels = {kPanel + kBlock, product, add};

}  // namespace DPO_ISA_NS
}  // namespace dpo
