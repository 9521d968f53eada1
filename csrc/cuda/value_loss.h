// value_loss: what its kernels are launched with.
#pragma once

#include "inputs.h"
#include "launch.h"
#include "rlkernels/aggregation.h"
#include "rlkernels/sequences.h"

namespace rlk {

struct ValueBatch {
  Floats values;      // [tokens], as are old_values, returns and mask
  Floats old_values;  // or null: not clipped
  Floats returns;
  Flags mask;  // or null: every token is scored
  Sequences sequences;
};

struct ValueResults {
  float *loss, *metrics, *scale;
  float* gradient;  // [tokens], or null: not wanted
};

void launch_value_loss(Launcher& launch, const ValueBatch& batch, float clip, const Denominator& denominator,
                       Floats normalizer, const ValueResults& results);

}  // namespace rlk
