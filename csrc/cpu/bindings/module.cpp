// The extension module. Importing it runs the registrations of the other files in this folder.

#include <pybind11/pybind11.h>

#include <cstdlib>

#include "bindings.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace rlk {
namespace {

constexpr const char* kNames[] = {"baseline", "avx2", "avx512"};

#if defined(__x86_64__)
// From the processor itself: __builtin_cpu_supports knows this feature since GCC 11, and with the runtime library of
// an older one answers no.
bool has_f16c() {
  unsigned eax, ebx, ecx, edx;
  return __get_cpuid(1, &eax, &ebx, &ecx, &edx) != 0 && (ecx & bit_F16C) != 0;
}
#endif

bool supported(Isa isa) {
#if defined(__x86_64__)
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c();
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  return isa == Isa::kBaseline || (isa == Isa::kAvx2 ? avx2 : avx512);
#else
  return isa == Isa::kBaseline;
#endif
}

// RLKERNELS_CPU_ISA is how the tests reach the others.
Isa choose_instruction_set() {
  const char* wanted = std::getenv("RLKERNELS_CPU_ISA");
  for (const Isa isa : {Isa::kAvx512, Isa::kAvx2, Isa::kBaseline})
    if (supported(isa) && (wanted == nullptr || std::string(wanted) == kNames[static_cast<int>(isa)])) return isa;
  std::string names;
  for (const Isa isa : {Isa::kAvx512, Isa::kAvx2, Isa::kBaseline})
    if (supported(isa)) names += std::string(names.empty() ? "" : ", ") + kNames[static_cast<int>(isa)];
  throw std::invalid_argument("RLKERNELS_CPU_ISA must be one of those this processor has: " + names + "; got '" +
                              wanted + "'");
}

}  // namespace

Isa instruction_set() {
  static const Isa isa = choose_instruction_set();
  return isa;
}

}  // namespace rlk

PYBIND11_MODULE(_C, m) {
  rlk::instruction_set();  // a wrong RLKERNELS_CPU_ISA fails at import
  m.def("instruction_set", [] { return rlk::kNames[static_cast<int>(rlk::instruction_set())]; });
}
