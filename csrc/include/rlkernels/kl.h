// kl_penalty, shaped_rewards: estimators of KL(policy || reference) from d = log policy - log reference of a sampled
// token.
#pragma once

#include "rlkernels/math.h"
#include "rlkernels/sequences.h"

namespace rlk {

enum KlEstimator { kK1 = 0, kK2 = 1, kK3 = 2, kAbs = 3 };

struct KlOptions {
  int estimator;
  bool straight_through;
  float log_ratio_clamp, value_clamp;
};

inline KlOptions make_kl_options(int64_t estimator, bool straight_through, double log_ratio_clamp, double value_clamp) {
  return {static_cast<int>(estimator), straight_through, static_cast<float>(log_ratio_clamp),
          static_cast<float>(value_clamp)};
}

// What the kernels of shaped_rewards read. The arrays are pointers, or pointers with a dtype.
template <class Array, class FlagArray>
struct RewardInputs {
  Array scores;    // [sequences]
  Array logprobs;  // [tokens], as are ref_logprobs and mask
  Array ref_logprobs;
  FlagArray mask;  // or null: every token is scored
  Sequences sequences;
  int estimator;
  float kl_coef;
  bool after_last;
};

template <class F>
RLK_HD F kl_estimate(int estimator, F d) {
  switch (estimator) {
    case kK1:
      return d;
    case kK2:
      return F(0.5f) * d * d;
    case kK3:
      return expm1(-d) + d;
    default:
      return abs(d);
  }
}

// d(kl_estimate)/dd. The straight-through forms take that of k2.
template <class F>
RLK_HD F kl_estimate_derivative(int estimator, bool straight_through, F d) {
  if (straight_through) return d;
  switch (estimator) {
    case kK1:
      return F(1);
    case kK2:
      return d;
    case kK3:
      return -expm1(-d);
    default:
      return select(d > F(0), F(1), select(d < F(0), F(-1), d));
  }
}

template <class F>
RLK_HD F kl_penalty(int estimator, F logprob, F ref_logprob, F log_ratio_clamp, F value_clamp) {
  F d = clamp(logprob - ref_logprob, -log_ratio_clamp, log_ratio_clamp);
  return clamp(kl_estimate(estimator, d), -value_clamp, value_clamp);
}

// d(kl_penalty)/dlogprob, and minus that by ref_logprob: 0 where either clamp made the value a constant.
template <class F>
RLK_HD F kl_penalty_derivative(int estimator, bool straight_through, F logprob, F ref_logprob, F log_ratio_clamp,
                               F value_clamp) {
  F raw = logprob - ref_logprob;
  F d = clamp(raw, -log_ratio_clamp, log_ratio_clamp);
  F derivative = kl_estimate_derivative(estimator, straight_through, d);
  derivative = select(abs(kl_estimate(estimator, d)) > value_clamp, F(0), derivative);
  return select(abs(raw) > log_ratio_clamp, F(0), derivative);
}

// The reward of a scored token, before its sequence's score is added: -kl_coef * estimate. With a coefficient of 0 it
// is 0, also where the estimate overflows.
template <class F>
RLK_HD F kl_reward(int estimator, F logprob, F ref_logprob, float kl_coef) {
  if (kl_coef == 0.0f) return F(0);
  return F(-kl_coef) * kl_estimate(estimator, logprob - ref_logprob);
}

}  // namespace rlk
