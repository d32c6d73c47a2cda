#include "isa.h"

#if defined(DPO_X86)
#include <cpuid.h>
#endif

#include <atomic>
#include <cstring>
#include <initializer_list>

namespace dpo {
namespace {

constexpr const char* kNames[] = {"plain", "avx2", "avx512", "neon"};

#if defined(DPO_X86)
// __builtin_cpu_supports knows this one from gcc 11 and clang 18 on.
bool has_f16c() {
  unsigned a, b, c, d;
  return __get_cpuid(1, &a, &b, &c, &d) && (c & bit_F16C) != 0;
}
#endif

bool has(Isa isa) {
  switch (isa) {
    case Isa::plain:
      return true;
#if defined(DPO_X86)
    // Asks the operating system too, which must save the wider registers.
    case Isa::avx2:
      return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c();
    case Isa::avx512:
      return has(Isa::avx2) && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
             __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
#elif defined(DPO_ARM64)
    case Isa::neon:
      return true;
#endif
    default:
      return false;
  }
}

Isa best() {
#if defined(DPO_X86)
  __builtin_cpu_init();
#endif
  for (Isa isa : {Isa::neon, Isa::avx512, Isa::avx2})
    if (has(isa)) return isa;
  return Isa::plain;
}

std::atomic<Isa>& current() {
  static std::atomic<Isa> isa{best()};
  return isa;
}

}  // namespace

Isa current_isa() { return current().load(std::memory_order_relaxed); }

}  // namespace dpo

// Rises whenever a function or a struct of this interface changes; the loader refuses another number than its own.
DPO_EXPORT int dpo_interface() { return 4; }

// Whether Intel made the processor, of which its math library makes the most.
DPO_EXPORT int dpo_is_intel() {
#if defined(DPO_X86)
  unsigned highest, name[3];
  return __get_cpuid(0, &highest, &name[0], &name[2], &name[1]) && std::memcmp(name, "GenuineIntel", sizeof name) == 0;
#else
  return 0;
#endif
}

// The digest of the sources that build_native.py compiled.
DPO_EXPORT const char* dpo_sources() { return DPO_SOURCES; }

DPO_EXPORT const char* dpo_isa() { return dpo::kNames[static_cast<int>(dpo::current_isa())]; }

// Whether this build and this processor have the instruction set; with `use`, all later calls run on it.
DPO_EXPORT int dpo_has_isa(const char* name, int use) {
  for (int i = 0; i < 4; ++i) {
    const auto isa = static_cast<dpo::Isa>(i);
    if (std::strcmp(name, dpo::kNames[i]) != 0 || !dpo::has(isa)) continue;
    if (use) dpo::current().store(isa);
    return 1;
  }
  return 0;
}
