// Inputs in the dtypes that the caller gave: a conversion before the kernel would be a launch, and traffic, of its own.
// Kernels read them by inputs.cuh.
#pragma once

#include <cstdint>

namespace rlk {

enum class Dtype : uint8_t { kFloat, kBfloat16, kHalf, kDouble };

// Numbers; null where the caller gave none.
struct Floats {
  const void* data = nullptr;
  Dtype dtype = Dtype::kFloat;
};

// Numbers that a kernel writes, such as a gradient in the dtype of its input.
struct FloatsOut {
  void* data = nullptr;
  Dtype dtype = Dtype::kFloat;
};

// A mask of elements of 1, 2, 4 or 8 bytes: nonzero is set. Of floating-point numbers -0 is zero.
struct Flags {
  const void* data = nullptr;
  int bytes = 1;
  bool floating = false;
};

}  // namespace rlk
