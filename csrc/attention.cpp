// Attention over a pack: what the threads do, in which tasks.
//
// A task writes to rows of its own and adds in its own order, so the number of threads changes no bit. Forward, it is
// some items of a segment; backward, one key head of a segment and of all that share its keys.
#include "attention.h"

#include <algorithm>
#include <cstdint>
#include <new>
#include <utility>
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

// Tasks, the dearest first, and how many threads take them, each with some memory of its own.
template <class Task>
struct Work {
  std::vector<Costed<Task>> tasks;
  int64_t threads, floats;

  Work(std::vector<Costed<Task>> all, int most_threads, int64_t scratch) : tasks(std::move(all)) {
    double total = 0;
    for (const auto& task : tasks) total += task.cost;
    std::stable_sort(tasks.begin(), tasks.end(), [](const auto& a, const auto& b) { return a.cost > b.cost; });
    const int64_t useful = std::min<int64_t>(int64_t(tasks.size()), 1 + int64_t(total / kThreadWorth));
    threads = std::max<int64_t>(1, std::min<int64_t>(most_threads, useful));
    // every thread's part begins on a cache line of its own
    floats = (scratch + 31) / 16 * 16;
  }

  int64_t scratch_bytes() const { return threads * floats * int64_t(sizeof(float)); }

  template <class Run>
  void run(void* scratch, const Run& run_task) const {
    each_item(int64_t(tasks.size()), int(threads), [&](int64_t item, int thread) {
      const auto address = reinterpret_cast<uintptr_t>(static_cast<float*>(scratch) + thread * floats);
      run_task(tasks[size_t(item)].task, reinterpret_cast<float*>((address + 63) / 64 * 64));
    });
  }
};

std::vector<AttentionSegment> read_segments(const AttentionArgs& args) {
  std::vector<AttentionSegment> segments;
  for (int64_t s = 0; s < args.num_segments; ++s) {
    const int64_t* row = args.segments + 4 * s;
    segments.push_back({row[0], row[1], row[2], row[3]});
  }
  return segments;
}

Work<ForwardTask> forward_work(const AttentionArgs& args) {
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
  return {std::move(tasks), args.threads, kernels.forward_scratch(args, keys)};
}

void forward(const AttentionArgs& args) {
  const AttentionKernels& kernels = DPO_PICK(attention_kernels);
  forward_work(args).run(args.scratch,
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

// `sinks`: a gradient for each family and query head; or empty.
Work<BackwardTask> backward_work(const AttentionArgs& args, const std::vector<Family>& families,
                                 std::vector<double>& sinks) {
  const int64_t group = args.query_heads / args.key_heads;
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
  return {std::move(tasks), args.threads, DPO_PICK(attention_kernels).backward_scratch(args, keys)};
}

void backward(const AttentionArgs& args) {
  const AttentionKernels& kernels = DPO_PICK(attention_kernels);
  const std::vector<Family> families = read_families(args);
  std::vector<double> sinks(args.grad_sinks == nullptr ? 0 : families.size() * size_t(args.query_heads));
  backward_work(args, families, sinks).run(args.scratch, [&](const BackwardTask& task, float* scratch) {
    kernels.backward(args, task, scratch);
  });
  if (args.grad_sinks == nullptr) return;
  for (int64_t head = 0; head < args.query_heads; ++head) {
    double total = 0;
    for (size_t f = 0; f < families.size(); ++f) total += sinks[f * size_t(args.query_heads) + size_t(head)];
    args.grad_sinks[head] = float(total);
  }
}

int64_t forward_scratch(const AttentionArgs& args) { return forward_work(args).scratch_bytes(); }

int64_t backward_scratch(const AttentionArgs& args) {
  const std::vector<Family> families = read_families(args);
  std::vector<double> none;
  return backward_work(args, families, none).scratch_bytes();
}

// False when there is no memory for the lists of tasks.
bool with_memory(void (*direction)(const AttentionArgs&), const AttentionArgs& args) noexcept {
  try {
    direction(args);
    return true;
  } catch (const std::bad_alloc&) {
    return false;
  }
}

// The same as a number below 0.
int64_t with_memory(int64_t (*scratch)(const AttentionArgs&), const AttentionArgs& args) noexcept {
  try {
    return scratch(args);
  } catch (const std::bad_alloc&) {
    return -1;
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

// Bytes of memory for these, from the sizes, the threads and the segments in a struct.
DPO_EXPORT int64_t dpo_attention_forward_scratch(const dpo::AttentionArgs* args) noexcept {
  return dpo::with_memory(dpo::forward_scratch, *args);
}

DPO_EXPORT int64_t dpo_attention_backward_scratch(const dpo::AttentionArgs* args) noexcept {
  return dpo::with_memory(dpo::backward_scratch, *args);
}
