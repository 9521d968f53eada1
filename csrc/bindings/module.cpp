// The extension module: importing it runs the registrations beside it.

#include <pybind11/pybind11.h>

#include <cstdlib>

#include "bindings.h"

namespace rlk {
namespace {

constexpr const char* kNames[] = {"baseline", "avx2", "avx512"};

bool supported(Isa isa) {
#if defined(__x86_64__)
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
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
