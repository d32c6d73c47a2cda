#include <cstdint>

#include "isa.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

// Asks for large pages of memory that nobody has touched yet; whether there are any is the system's business.
DPO_EXPORT void dpo_want_huge_pages(void* begin, int64_t bytes) {
#if defined(MADV_HUGEPAGE)
  constexpr uintptr_t page = uintptr_t{1} << 21;
  const uintptr_t first = (reinterpret_cast<uintptr_t>(begin) + page - 1) / page * page;
  const uintptr_t last = (reinterpret_cast<uintptr_t>(begin) + static_cast<uintptr_t>(bytes)) / page * page;
  if (first < last) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#else
  (void)begin;
  (void)bytes;
#endif
}
