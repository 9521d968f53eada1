#pragma once

#include "kernels.h"
#include "rlkernels/sequences.h"

namespace rlk {

struct KlPenalty {
  int estimator;
  bool straight_through;
  float log_ratio_clamp, value_clamp;
};

struct ShapedRewards {
  const float* scores;    // [sequences]
  const float* logprobs;  // [tokens], as are ref_logprobs and mask
  const float* ref_logprobs;
  const bool* mask;  // or null: every token is scored
  Sequences sequences;
  int estimator;
  float kl_coef;
  bool after_last;
};

template <Isa>
struct KlKernels {
  // Elements [begin, end).
  static void kl_penalty_forward(const KlPenalty& options, const float* logprobs, const float* ref_logprobs,
                                 float* penalty, int64_t begin, int64_t end);
  static void kl_penalty_backward(const KlPenalty& options, const float* grad, const float* logprobs,
                                  const float* ref_logprobs, float* grad_logprobs, int64_t begin, int64_t end);
  // The penalties of tokens [begin, end); then the scores of sequences [begin, end) on top.
  static void shape_rewards(const ShapedRewards& problem, float* rewards, int64_t begin, int64_t end);
  static void add_scores(const ShapedRewards& problem, float* rewards, int64_t begin, int64_t end);
};

}  // namespace rlk
