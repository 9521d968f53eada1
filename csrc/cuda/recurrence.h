// recurrence: what its kernels are launched with.
#pragma once

#include "inputs.h"
#include "launch.h"
#include "rlkernels/recurrence.h"

namespace rlk {

struct RecurrenceBatch : RecurrenceInputs<Floats, Flags> {
  const float* valid;  // NaN where cu_seqlens are not; null without them
  RecurrenceOptions options;
  float* advantages;  // null where the kind has none
  float* returns;

  __device__ bool usable() const { return valid == nullptr || *valid == 1.0f; }
};

void launch_recurrence(Launcher& launch, RecurrenceBatch batch, int kind, bool whiten);

}  // namespace rlk
