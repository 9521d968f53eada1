// policy_loss: what its kernels are launched with.
#pragma once

#include "inputs.h"
#include "launch.h"
#include "rlkernels/aggregation.h"
#include "rlkernels/policy_loss.h"

namespace rlk {

using PolicyBatch = PolicyInputs<Floats, Flags>;

void launch_policy_loss(Launcher& launch, const PolicyBatch& batch, const PolicyOptions& options,
                        const Denominator& denominator, Floats normalizer, const PolicyResults& results);

}  // namespace rlk
