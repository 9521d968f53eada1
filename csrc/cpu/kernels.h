#pragma once

// The CPU kernels work on raw pointers. Those of op <op> are the members of <Op>Kernels<Isa>, declared in <op>.h and
// compiled once per instruction set (build_tools/modules.py); bindings/ chooses one at run time. Functions with begin
// and end do that part of the work, so that the caller can spread it over threads; where it is cut never changes a
// result.

#include <cstdint>

namespace rlk {

enum class Isa { kBaseline, kAvx2, kAvx512 };

// Tokens per partial sum of a loss: fixed, so that the sum is the same whatever the number of threads.
constexpr int64_t kLossBlock = 1024;

}  // namespace rlk
