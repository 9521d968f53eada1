// kl_penalty and shaped_rewards: what their kernels are launched with.
#pragma once

#include "inputs.h"
#include "launch.h"
#include "rlkernels/kl.h"

namespace rlk {

struct RewardBatch : RewardInputs<Floats, Flags> {
  const float* valid;  // NaN where cu_seqlens is not what it should be, else 1; or null: 1
};

// `count` elements.
void launch_kl_penalty_forward(const Launcher& launch, Floats logprobs, Floats ref_logprobs, float* penalty,
                               int64_t count, const KlOptions& options);
// grad_ref may be null: not wanted.
void launch_kl_penalty_backward(const Launcher& launch, const float* grad, Floats logprobs, Floats ref_logprobs,
                                FloatsOut grad_logprobs, FloatsOut grad_ref, int64_t count, const KlOptions& options);

void launch_shaped_rewards(Launcher& launch, RewardBatch batch, float* rewards);

}  // namespace rlk
