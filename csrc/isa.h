// Which instruction set runs: chosen once from what the processor has, or forced by name.
#pragma once

#if defined(_WIN32)
#define DPO_EXPORT extern "C" __declspec(dllexport)
#else
#define DPO_EXPORT extern "C" __attribute__((visibility("default")))
#endif

#if defined(__x86_64__) || defined(_M_X64)
#define DPO_X86 1
#elif defined(__aarch64__)
#define DPO_ARM64 1
#endif

namespace dpo {

enum class Isa : int { plain, avx2, avx512, neon };

Isa current_isa();

// Declares a table of kernels, which exists once for every instruction set that this build has.
#if defined(DPO_X86)
#define DPO_DECLARE_TABLES(Table, name)        \
  namespace plain { extern const Table name; } \
  namespace avx2 { extern const Table name; }  \
  namespace avx512 { extern const Table name; }
#define DPO_PICK(name)                                     \
  (::dpo::current_isa() == ::dpo::Isa::avx512 ? ::dpo::avx512::name \
   : ::dpo::current_isa() == ::dpo::Isa::avx2 ? ::dpo::avx2::name   \
                                              : ::dpo::plain::name)
#elif defined(DPO_ARM64)
#define DPO_DECLARE_TABLES(Table, name)        \
  namespace plain { extern const Table name; } \
  namespace neon { extern const Table name; }
#define DPO_PICK(name) (::dpo::current_isa() == ::dpo::Isa::neon ? ::dpo::neon::name : ::dpo::plain::name)
#else
#define DPO_DECLARE_TABLES(Table, name) \
  namespace plain { extern const Table name; }
#define DPO_PICK(name) (::dpo::plain::name)
#endif

}  // namespace dpo
