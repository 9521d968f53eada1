// value_loss: what its kernels are launched with.
#pragma once

#include "launch.h"
#include "rlkernels/aggregation.h"
#include "rlkernels/sequences.h"

namespace rlk {

struct ValueBatch {
  const float* values;      // [tokens], as are old_values, returns and mask
  const float* old_values;  // or null: not clipped
  const float* returns;
  const bool* mask;  // or null: every token is scored
  Sequences sequences;
};

struct ValueResults {
  float *loss, *metrics, *scale;
  float* gradient;  // [tokens], or null: not wanted
};

void launch_value_loss(Launcher& launch, const ValueBatch& batch, float clip, const Denominator& denominator,
                       const ValueResults& results);

}  // namespace rlk
