// Attention over a pack: what the threads do, in which tasks.
//
// A task writes to rows of its own and adds in its own order, so the number of threads changes no bit. Forward, it is
// some items of a segment; backward, one key head of a segment and of all that share its keys.
#include "attention.h"

#include <algorithm>
#include <atomic>
#include <memory>
#include <new>
#include <vector>

#include "threads.h"

namespace dpo {
namespace {

constexpr int64_t kItems = 1024;
constexpr double kThreadWorth = 1e6;  // multiplications that take as long as a thread takes to start

double cost(const AttentionArgs& args, int64_t queries, int64_t keys) {
  const double group = double(args.query_heads) / double(args.key_heads);
  return group * double(queries) * double(keys) * double(args.key_dim + args.value_dim);
}

template <class Task>
struct Costed {
  Task task;
  double cost;
};

// Runs all tasks, the dearest first, with as much scratch memory for each thread; false when there is no memory.
template <class Task, class Run>
bool run(std::vector<Costed<Task>>& tasks, int threads, int64_t scratch, const Run& run_task) {
  double total = 0;
  for (const auto& task : tasks) total += task.cost;
  std::stable_sort(tasks.begin(), tasks.end(), [](const auto& a, const auto& b) { return a.cost > b.cost; });
  const int64_t count = int64_t(tasks.size());
  const int64_t useful = std::min<int64_t>(count, 1 + int64_t(total / kThreadWorth));
  const int64_t used = std::max<int64_t>(1, std::min<int64_t>(threads, useful));
  // every thread's part begins on a cache line of its own
  const int64_t size = (scratch + 31) / 16 * 16;
  std::unique_ptr<float[]> memory(new (std::nothrow) float[size_t(used * size)]);
  if (memory == nullptr) return false;
  std::atomic<int64_t> next{0};
  split(used, int(used), [&](int64_t begin, int64_t end) {
    for (int64_t thread = begin; thread < end; ++thread) {
      auto address = reinterpret_cast<uintptr_t>(memory.get() + thread * size);
      auto* own = reinterpret_cast<float*>((address + 63) / 64 * 64);
      for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < count;) run_task(tasks[size_t(i)].task, own);
    }
  });
  return true;
}

std::vector<AttentionSegment> read_segments(const AttentionArgs& args) {
  std::vector<AttentionSegment> segments;
  for (int64_t s = 0; s < args.num_segments; ++s) {
    const int64_t* row = args.segments + 4 * s;
    segments.push_back({row[0], row[1], row[2], row[3]});
  }
  return segments;
}

bool forward(const AttentionArgs& args) {
  const AttentionKernels& kernels = DPO_PICK(attention_kernels);
  const int64_t step = std::max<int64_t>(1, kItems / kernels.strip) * kernels.strip;
  std::vector<Costed<ForwardTask>> tasks;
  int64_t keys = 0;
  for (const AttentionSegment& segment : read_segments(args)) {
    const int64_t group = args.query_heads / args.key_heads, items = num_queries(segment) * group;
    keys = std::max(keys, num_keys(segment));
    for (int64_t item = 0; item < items; item += step) {
      const int64_t last = std::min(items, item + step);
      const double part = cost(args, last - item, prefix_keys(segment) + (item + last) / 2 / group) / double(group);
      for (int64_t head = 0; head < args.key_heads; ++head) tasks.push_back({{segment, head, item, last}, part});
    }
  }
  return run(tasks, args.threads, kernels.forward_scratch(args, keys),
             [&](const ForwardTask& task, float* scratch) { kernels.forward(args, task, scratch); });
}

// A segment with keys of its own, and those that begin with its keys.
struct Family {
  std::vector<AttentionSegment> segments;
  int64_t max_keys = 0;
  double cost = 0;
};

std::vector<Family> read_families(const AttentionArgs& args) {
  const std::vector<AttentionSegment> segments = read_segments(args);
  std::vector<Family> families;
  std::vector<int64_t> starts;
  for (const AttentionSegment& segment : segments)
    if (prefix_keys(segment) == 0) starts.push_back(segment.start);
  families.resize(starts.size());
  for (int sharing = 1; sharing >= 0; --sharing)
    for (const AttentionSegment& segment : segments) {
      if ((prefix_keys(segment) > 0) != (sharing == 1)) continue;
      const int64_t owner = sharing ? segment.prefix_start : segment.start;
      Family& family = families[size_t(std::lower_bound(starts.begin(), starts.end(), owner) - starts.begin())];
      family.segments.push_back(segment);
      family.max_keys = std::max(family.max_keys, num_keys(segment));
      family.cost += 2.5 * cost(args, num_queries(segment), num_keys(segment));
    }
  for (Family& family : families)
    std::stable_sort(family.segments.begin(), family.segments.end() - 1,
                     [](const auto& a, const auto& b) { return prefix_keys(a) < prefix_keys(b); });
  return families;
}

bool backward(const AttentionArgs& args) {
  const AttentionKernels& kernels = DPO_PICK(attention_kernels);
  const std::vector<Family> families = read_families(args);
  const int64_t group = args.query_heads / args.key_heads;
  std::vector<double> sinks(args.grad_sinks == nullptr ? 0 : families.size() * size_t(args.query_heads));
  std::vector<Costed<BackwardTask>> tasks;
  int64_t keys = 0;
  for (size_t f = 0; f < families.size(); ++f) {
    const Family& family = families[f];
    keys = std::max(keys, family.max_keys);
    for (int64_t head = 0; head < args.key_heads; ++head) {
      double* own = sinks.empty() ? nullptr : &sinks[f * size_t(args.query_heads) + size_t(head * group)];
      tasks.push_back(
          {{family.segments.data(), int64_t(family.segments.size()), family.max_keys, head, own}, family.cost});
    }
  }
  const bool done = run(tasks, args.threads, kernels.backward_scratch(args, keys),
                        [&](const BackwardTask& task, float* scratch) { kernels.backward(args, task, scratch); });
  if (done && args.grad_sinks != nullptr)
    for (int64_t head = 0; head < args.query_heads; ++head) {
      double total = 0;
      for (size_t f = 0; f < families.size(); ++f) total += sinks[f * size_t(args.query_heads) + size_t(head)];
      args.grad_sinks[head] = float(total);
    }
  return done;
}

// False when there is no memory for the lists of tasks, either.
bool with_memory(bool (*direction)(const AttentionArgs&), const AttentionArgs& args) noexcept {
  try {
    return direction(args);
  } catch (const std::bad_alloc&) {
    return false;
  }
}

}  // namespace
}  // namespace dpo

DPO_EXPORT void dpo_attention_forward(dpo::AttentionArgs* args) noexcept {
  args->failed = !dpo::with_memory(dpo::forward, *args);
}

DPO_EXPORT void dpo_attention_backward(dpo::AttentionArgs* args) noexcept {
  args->failed = !dpo::with_memory(dpo::backward, *args);
}
