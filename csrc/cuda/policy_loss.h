// policy_loss: what its kernels are launched with.
#pragma once

#include "launch.h"
#include "rlkernels/aggregation.h"
#include "rlkernels/policy_loss.h"
#include "rlkernels/sequences.h"

namespace rlk {

struct PolicyBatch {
  const float* logprobs;          // [tokens], as are the four below and mask
  const float* old_logprobs;      // or null: logprobs
  const float* ref_logprobs;      // or null
  const float* sampler_logprobs;  // or null
  const float* entropy;           // or null
  const bool* mask;               // or null: every token is scored
  const float* advantages;        // [tokens] or [sequences]
  bool advantage_per_token;
  Sequences sequences;

  __device__ float old_logprob(int64_t token) const {
    return old_logprobs != nullptr ? old_logprobs[token] : logprobs[token];
  }
};

struct PolicyResults {
  float *loss, *metrics, *scale;
  float *gradient, *entropy_gradient;  // [tokens], or null: not wanted
};

void launch_policy_loss(Launcher& launch, const PolicyBatch& batch, const PolicyOptions& options,
                        const Denominator& denominator, const PolicyResults& results);

}  // namespace rlk
