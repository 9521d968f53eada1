#pragma once

#include "kernels.h"
#include "rlkernels/kl.h"

namespace rlk {

using ShapedRewards = RewardInputs<const float*, const bool*>;

template <Isa>
struct KlKernels {
  // Elements [begin, end).
  static void kl_penalty_forward(const KlOptions& options, const float* logprobs, const float* ref_logprobs,
                                 float* penalty, int64_t begin, int64_t end);
  static void kl_penalty_backward(const KlOptions& options, const float* grad, const float* logprobs,
                                  const float* ref_logprobs, float* grad_logprobs, int64_t begin, int64_t end);
  // The penalties of tokens [begin, end); then the scores of sequences [begin, end) on top.
  static void shape_rewards(const ShapedRewards& problem, float* rewards, int64_t begin, int64_t end);
  static void add_scores(const ShapedRewards& problem, float* rewards, int64_t begin, int64_t end);
};

}  // namespace rlk
