#pragma once

#include "kernels.h"
#include "rlkernels/groups.h"

namespace rlk {

struct GroupAdvantages {
  const float* rewards;  // [rows, columns]
  const float* weights;  // [columns], or null: all 1
  const int64_t* order;  // [rows] and offsets [rows + 1], or both null: groups of `group_size` consecutive rows
  const int64_t* offsets;
  int64_t rows, columns, group_size;
  GroupOptions options;
};

template <Isa>
struct GroupsKernels {
  static void group_advantages(const GroupAdvantages& problem, float* advantages, bool* signal);
};

}  // namespace rlk
