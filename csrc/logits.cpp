#include "logits.h"

#include "threads.h"

namespace {

// Below, a thread costs more than it saves.
constexpr int64_t kElementsOfThread = 1 << 15;

template <class Args>
void run(const Args* args, void (*kernel)(const Args&, int64_t, int64_t)) {
  const int64_t useful = 1 + args->rows * args->columns / kElementsOfThread;
  const int threads = static_cast<int>(std::min<int64_t>(args->threads, useful));
  dpo::split(args->rows, threads, [&](int64_t begin, int64_t end) { kernel(*args, begin, end); });
}

}  // namespace

DPO_EXPORT void dpo_fold(const dpo::FoldArgs* args) { run(args, DPO_PICK(logits_kernels).fold); }

DPO_EXPORT void dpo_gradient(const dpo::GradientArgs* args) { run(args, DPO_PICK(logits_kernels).gradient); }

DPO_EXPORT void dpo_convert(const dpo::ConvertArgs* args) { run(args, DPO_PICK(logits_kernels).convert); }
