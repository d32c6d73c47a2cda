#include "logits.h"

#include "threads.h"

namespace {

// Below, a thread costs more than it saves.
constexpr int64_t kElementsOfThread = 1 << 15;
// A thread takes rows when it is free: on a busy machine the others do not wait for half of them.
constexpr int64_t kElementsOfItem = 1 << 17;

template <class Args>
void run(const Args* args, void (*kernel)(const Args&, int64_t, int64_t)) {
  const int64_t useful = 1 + args->rows * args->columns / kElementsOfThread;
  const int threads = static_cast<int>(std::min<int64_t>(args->threads, useful));
  const int64_t most = std::max<int64_t>(1, kElementsOfItem / std::max<int64_t>(1, args->columns));
  const int64_t items = (args->rows + most - 1) / most;
  dpo::each_item(items, threads, [&](int64_t item, int) {
    kernel(*args, args->rows * item / items, args->rows * (item + 1) / items);
  });
}

}  // namespace

DPO_EXPORT void dpo_fold(const dpo::FoldArgs* args) { run(args, DPO_PICK(logits_kernels).fold); }

DPO_EXPORT void dpo_gradient(const dpo::GradientArgs* args) { run(args, DPO_PICK(logits_kernels).gradient); }

DPO_EXPORT void dpo_convert(const dpo::ConvertArgs* args) { run(args, DPO_PICK(logits_kernels).convert); }
