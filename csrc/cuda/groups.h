// group_advantages: what its kernels are launched with.
#pragma once

#include "inputs.h"
#include "launch.h"
#include "rlkernels/groups.h"

namespace rlk {

// Row i of group g is order[offsets[g] + i], or g * group_size + i where both are null.
struct Groups {
  const int64_t *order, *offsets;
  int64_t group_size, count;

  __device__ int64_t begin(int64_t g) const { return offsets != nullptr ? offsets[g] : g * group_size; }
  __device__ int64_t row(int64_t position) const { return order != nullptr ? order[position] : position; }
};

// ids of 1, 2, 4 or 8 bytes, signed or not; order [count] and offsets [count + 1].
struct GroupIds {
  const void* data;
  Dtype dtype;
};
void launch_group_segments(Launcher& launch, const GroupIds& ids, int count, int64_t* order, int64_t* offsets);

// Numbers that one launch takes by value.
constexpr int kArguments = 64;
struct Numbers {
  float values[kArguments];
  int count;
};
void launch_numbers_on_device(Launcher& launch, const Numbers& numbers, float* result);

// rewards [rows, kinds] and weights [kinds], which may be null: all 1; advantages [rows] and signal [rows].
void launch_group_advantages(Launcher& launch, Floats rewards, Floats weights, int64_t rows, int64_t kinds,
                             const Groups& groups, const GroupOptions& options, float* advantages, bool* signal);

}  // namespace rlk
