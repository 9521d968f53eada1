// value_loss: what its kernels are launched with.
#pragma once

#include "inputs.h"
#include "launch.h"
#include "rlkernels/aggregation.h"
#include "rlkernels/value_loss.h"

namespace rlk {

using ValueBatch = ValueInputs<Floats, Flags>;

void launch_value_loss(Launcher& launch, const ValueBatch& batch, float clip, const Denominator& denominator,
                       Floats normalizer, const ValueResults& results);

}  // namespace rlk
