// Inputs in the dtypes that the caller gave: a conversion before the kernel would be a launch, and traffic, of its own.
// Kernels read them by inputs.cuh.
#pragma once

#include <cstdint>
#include <initializer_list>

namespace rlk {

enum class Dtype : uint8_t { kFloat, kBfloat16, kHalf, kDouble, kInt64, kInt32, kInt16, kInt8, kUint8 };

// Floating-point numbers, or one number of any dtype; null where the caller gave none.
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

// Whether numbers are floats, masks bytes, and all start at multiples of 16 bytes, of those that there are.
inline bool all_plain(std::initializer_list<Floats> numbers, std::initializer_list<Flags> masks) {
  const auto starts_at_16 = [](const void* data) { return reinterpret_cast<uintptr_t>(data) % 16 == 0; };
  bool plain = true;
  for (const Floats& array : numbers) plain = plain && array.dtype == Dtype::kFloat && starts_at_16(array.data);
  for (const Flags& array : masks) plain = plain && array.bytes == 1 && starts_at_16(array.data);
  return plain;
}

}  // namespace rlk
