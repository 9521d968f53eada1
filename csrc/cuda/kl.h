// kl_penalty and shaped_rewards: what their kernels are launched with.
#pragma once

#include "launch.h"
#include "rlkernels/sequences.h"

namespace rlk {

struct KlOptions {
  int estimator;
  bool straight_through;
  float log_ratio_clamp, value_clamp;
};

struct RewardBatch {
  const float* scores;    // [sequences]
  const float* logprobs;  // [tokens], as are ref_logprobs and mask
  const float* ref_logprobs;
  const bool* mask;    // or null: every token is scored
  const float* valid;  // NaN where cu_seqlens is not what it should be, else 1; or null: 1
  Sequences sequences;
  int estimator;
  float kl_coef;
  bool after_last;
  bool aligned;  // whether four tokens can be read and written at once

  __device__ bool scored(int64_t token) const { return mask == nullptr || mask[token]; }
};

// `count` elements.
void launch_kl_penalty_forward(const Launcher& launch, const float* logprobs, const float* ref_logprobs, float* penalty,
                               int64_t count, const KlOptions& options);
void launch_kl_penalty_backward(const Launcher& launch, const float* grad, const float* logprobs,
                                const float* ref_logprobs, float* grad_logprobs, int64_t count,
                                const KlOptions& options);

void launch_shaped_rewards(const Launcher& launch, RewardBatch batch, float* rewards);

}  // namespace rlk
