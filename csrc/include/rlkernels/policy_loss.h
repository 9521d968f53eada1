// policy_loss: the loss of one token, its derivative by the token's log-probability, and what the metrics average.
#pragma once

#include "rlkernels/kl.h"
#include "rlkernels/math.h"

namespace rlk {

enum Objective { kPpo = 0, kReinforce = 1 };
enum Aggregation { kTokenMean = 0, kSeqMeanTokenMean = 1, kSeqMeanTokenSum = 2, kTokenSum = 3 };

// In the order of policy_loss.metrics; all but the last are means over scored tokens.
enum PolicyMetric { kRatioMean = 0, kClipLow = 1, kClipHigh = 2, kApproxKl = 3, kRefKl = 4, kNumTokens = 5 };
constexpr int kPolicyMetrics = 6;

struct PolicyOptions {
  int objective;
  int kl_estimator;
  bool kl_straight_through;
  bool has_ref;
  bool has_dual_clip;
  float ratio_min, ratio_max;  // 1 - clip_low, 1 + clip_high, rounded once from double
  float dual_clip, log_ratio_clamp, kl_coef;
};

inline PolicyOptions make_policy_options(int objective, bool has_ref, double clip_low, double clip_high,
                                         double dual_clip, double log_ratio_clamp, double kl_coef, int kl_estimator,
                                         bool kl_straight_through) {
  PolicyOptions o;
  o.objective = objective;
  o.kl_estimator = kl_estimator;
  o.kl_straight_through = kl_straight_through;
  o.has_ref = has_ref;
  o.has_dual_clip = dual_clip < std::numeric_limits<double>::infinity();
  o.ratio_min = static_cast<float>(1.0 - clip_low);
  o.ratio_max = static_cast<float>(1.0 + clip_high);
  o.dual_clip = static_cast<float>(dual_clip);
  o.log_ratio_clamp = static_cast<float>(log_ratio_clamp);
  o.kl_coef = static_cast<float>(kl_coef);
  return o;
}

template <class F>
struct TokenLoss {
  F loss, derivative;
  F ratio, clipped_low, clipped_high, approx_kl, ref_kl;  // clipped_*: 0 or 1
};

// ppo:        l = -min(r A, clip(r) A),  r = exp(d),  d = clamp(logprob - old)
//             dl/dlogprob = -r A where the first is the smaller (or they agree) and d is not clamped, else 0
// dual clip:  where A < 0, l = min(l, -dual_clip A), whose derivative is 0
// reinforce:  l = -logprob A
template <class F>
RLK_HD TokenLoss<F> policy_token_loss(const PolicyOptions& o, F logprob, F old_logprob, F ref_logprob, F advantage) {
  TokenLoss<F> t;
  F raw = logprob - old_logprob;
  F d = clamp(raw, F(-o.log_ratio_clamp), F(o.log_ratio_clamp));
  t.ratio = exp(d);
  t.approx_kl = expm1(d) - d;
  t.clipped_low = F(0);
  t.clipped_high = F(0);
  if (o.objective == kPpo) {
    F free = t.ratio * advantage;
    F clipped = clamp(t.ratio, F(o.ratio_min), F(o.ratio_max)) * advantage;
    F gain = select(clipped < free, clipped, free);
    F slope = select(clipped < free, F(0), free);
    if (o.has_dual_clip) {
      F least = F(o.dual_clip) * advantage;
      F bounded = select(gain < least, least, gain);
      slope = select(advantage < F(0), select(gain < least, F(0), slope), slope);
      gain = select(advantage < F(0), bounded, gain);
    }
    t.loss = -gain;
    t.derivative = -select(abs(raw) > F(o.log_ratio_clamp), F(0), slope);
    t.clipped_low = select(t.ratio < F(o.ratio_min), select(advantage < F(0), F(1), F(0)), F(0));
    t.clipped_high = select(t.ratio > F(o.ratio_max), select(advantage > F(0), F(1), F(0)), F(0));
  } else {
    t.loss = -(logprob * advantage);
    t.derivative = -advantage;
  }
  t.ref_kl = F(0);
  if (o.has_ref) {
    F d_ref = logprob - ref_logprob;
    t.ref_kl = kl_estimate(o.kl_estimator, d_ref);
    // A coefficient of 0 leaves the loss alone, also where the estimate overflows.
    if (o.kl_coef != 0.0f) {
      t.loss = t.loss + F(o.kl_coef) * t.ref_kl;
      t.derivative = t.derivative + F(o.kl_coef) * kl_estimate_derivative(o.kl_estimator, o.kl_straight_through, d_ref);
    }
  }
  return t;
}

}  // namespace rlk
