// Work over a number of threads that end with the call, so that nothing spins or waits between calls.
//
// Which thread does what may not change a result: items write to places of their own.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <system_error>
#include <thread>
#include <vector>

namespace dpo {

// Runs work(0), ..., work(count - 1), each on a thread of its own but for one, which is the caller's.
template <class Work>
void run_on_threads(int count, const Work& work) {
  std::vector<std::thread> others;
  int started = 1;
  try {
    others.reserve(count > 1 ? count - 1 : 0);
    for (; started < count; ++started) others.emplace_back([&work, started] { work(started); });
  } catch (const std::system_error&) {
    // No more threads to be had: the caller does the rest.
  } catch (const std::bad_alloc&) {
  }
  work(0);
  for (int i = started; i < count; ++i) work(i);
  for (auto& thread : others) thread.join();
}

// f(begin, end) for contiguous parts of [0, count), as even as can be.
template <class F>
void split(int64_t count, int threads, const F& f) {
  const int64_t parts = std::max<int64_t>(1, std::min<int64_t>(threads, count));
  run_on_threads(static_cast<int>(parts), [&](int i) { f(count * i / parts, count * (i + 1) / parts); });
}

// f(item, thread) for every item of [0, count), by whichever thread is free.
template <class F>
void each_item(int64_t count, int threads, const F& f) {
  std::atomic<int64_t> next{0};
  run_on_threads(static_cast<int>(std::max<int64_t>(1, std::min<int64_t>(threads, count))), [&](int thread) {
    for (int64_t item; (item = next.fetch_add(1, std::memory_order_relaxed)) < count;) f(item, thread);
  });
}

}  // namespace dpo
