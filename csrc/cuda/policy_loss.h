// policy_loss: what its kernels are launched with.
#pragma once

#include "inputs.h"
#include "launch.h"
#include "rlkernels/aggregation.h"
#include "rlkernels/policy_loss.h"
#include "rlkernels/sequences.h"

namespace rlk {

struct PolicyBatch {
  Floats logprobs;          // [tokens], as are the four below and mask
  Floats old_logprobs;      // or null: logprobs
  Floats ref_logprobs;      // or null
  Floats sampler_logprobs;  // or null
  Floats entropy;           // or null
  Flags mask;               // or null: every token is scored
  Floats advantages;        // [tokens] or [sequences]
  bool advantage_per_token;
  Sequences sequences;
};

struct PolicyResults {
  float *loss, *metrics, *scale;
  float *gradient, *entropy_gradient;  // [tokens], or null: not wanted
};

void launch_policy_loss(Launcher& launch, const PolicyBatch& batch, const PolicyOptions& options,
                        const Denominator& denominator, Floats normalizer, const PolicyResults& results);

}  // namespace rlk
