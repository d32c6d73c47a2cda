// Products: which thread computes what. Tasks write to places of their own, and a depth is cut, and its parts added, in the
// same way whatever the number of threads.
#include "products.h"

#include <algorithm>
#include <cstddef>

#include "threads.h"

namespace dpo {
namespace {

constexpr double kThreadWorth = 4e6;  // multiplications that take much longer than a thread takes to start
constexpr int64_t kDepthParts = 8, kDepthOfPart = 1024, kPartialBytes = 32 << 20;
constexpr int64_t kLeastRows = 256, kLeastColumns = 128;
constexpr int64_t kTasksOfThread = 8;

int64_t parts_of(int64_t size, int64_t least, int64_t wanted) {
  return std::max<int64_t>(1, std::min(wanted, size / least));
}

// How a product is cut.
struct Cuts {
  int64_t depth, rows, columns;  // parts
  int64_t threads;

  Cuts(const ProductArgs& args) : depth(1), rows(1), columns(1) {
    const double work = double(args.rows) * double(args.columns) * double(args.depth);
    threads = std::max<int64_t>(1, std::min<int64_t>(args.threads, 1 + int64_t(work / kThreadWorth)));
    // Long sums of a small result, which all threads then add up; their number may not depend on that of the threads.
    if (args.depth >= 2 * std::max(args.rows, args.columns)) {
      const int64_t room = 1 + kPartialBytes / (int64_t(sizeof(float)) * args.rows * args.columns);
      depth = parts_of(args.depth, kDepthOfPart, std::min(room, kDepthParts));
    }
    if (threads == 1) return;
    // Every part of the columns reads all of a, and packs it where its rows are contiguous; every part of the rows packs
    // all of b.
    const int64_t wanted = (threads * kTasksOfThread + depth - 1) / depth;
    if (args.a_depth == 1)
      columns = parts_of(args.columns, kLeastColumns, wanted);
    else
      rows = parts_of(args.rows, kLeastRows, wanted);
    if (count() >= threads) return;
    rows = std::max(rows, parts_of(args.rows, kLeastRows / 4, threads));
    columns = std::max(columns, parts_of(args.columns, kLeastColumns, threads));
  }

  int64_t count() const { return depth * rows * columns; }
  int64_t used_threads() const { return std::min(threads, count()); }
  int64_t partial_sums(const ProductArgs& args) const { return (depth - 1) * args.rows * args.columns; }

  ProductTask task(const ProductArgs& args, int64_t item, float* partial) const {
    const int64_t d = item / (rows * columns), r = item / columns % rows, c = item % columns;
    ProductTask task{};
    task.row = args.rows * r / rows, task.row_end = args.rows * (r + 1) / rows;
    task.column = args.columns * c / columns, task.column_end = args.columns * (c + 1) / columns;
    task.depth = args.depth * d / depth, task.depth_end = args.depth * (d + 1) / depth;
    task.out = args.out, task.out_row = args.out_row, task.accumulate = args.accumulate != 0;
    if (d > 0) task.out = partial + (d - 1) * args.rows * args.columns, task.out_row = args.columns;
    if (d > 0) task.accumulate = false;
    return task;
  }
};

void product(const ProductArgs& args) {
  const ProductKernels& kernels = DPO_PICK(product_kernels);
  const Cuts cuts(args);
  const int threads = int(cuts.used_threads());
  float* partial = args.scratch;
  float* scratch = partial + cuts.partial_sums(args);
  each_item(cuts.count(), threads, [&](int64_t item, int thread) {
    kernels.product(args, cuts.task(args, item, partial), scratch + thread * kernels.scratch);
  });
  if (cuts.depth == 1) return;
  split(args.rows, threads, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row)
      for (int64_t part = 0; part < cuts.depth - 1; ++part) {
        const float* from = partial + (part * args.rows + row) * args.columns;
        kernels.add(from, args.out + row * args.out_row, args.columns);
      }
  });
}

}  // namespace
}  // namespace dpo

DPO_EXPORT void dpo_product(const dpo::ProductArgs* args) { dpo::product(*args); }

// Bytes of memory for dpo_product, of a struct without addresses.
DPO_EXPORT int64_t dpo_product_scratch(const dpo::ProductArgs* args) {
  const dpo::Cuts cuts(*args);
  const int64_t of_threads = cuts.used_threads() * DPO_PICK(product_kernels).scratch;
  return int64_t(sizeof(float)) * (cuts.partial_sums(*args) + of_threads);
}
