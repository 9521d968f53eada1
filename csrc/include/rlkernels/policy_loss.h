// policy_loss: the loss of one token, its derivative by the token's log-probability, and what the metrics average.
//
//   x = logprob - old,  d = clamp(x, +-log_ratio_clamp),  r = exp(d),  A the advantage, sg(.) not differentiated
//
//   objective  loss l                                             derivative of the sum of losses by the logprob
//   ppo        -min(min(r, delta) A, clip(r) A)                   -r A where the smaller (the first if they agree) is
//                                                                 r A and d is not clamped; else 0
//              dual clip, where A < 0: min(l, -dual_clip A)       0 where that is the smaller
//   gspo       as ppo, r = exp(clamp(mean of x over the           as ppo: the sum over a sequence of one advantage and
//              sequence, +-log_ratio_clamp)) for every token      length n gives n (-r A) / n to each of its tokens
//   reinforce  -A logprob                                         -A
//   cispo      -sg(clip(r)) A logprob                             -clip(r) A
//   sapo       -(4 / tau) sigmoid(tau (r - 1)) A,                 -4 sigmoid (1 - sigmoid) r A, 0 where d is clamped
//              tau = tau_pos where A > 0, else tau_neg
//   gmpo       -R A,  A the sequence's mean,                      -R A where c = x, 0 where it is bounded
//              R = exp(clamp(mean of c, +-log_ratio_clamp)),
//              c = min(x, clip_high) where A > 0, max(x, -clip_low) where A < 0, 0 where A = 0
//   dppo_*     -sg(min(r, delta)) A logprob [trusted]             -min(r, delta) A where trusted, else 0
//              where A > 0: D <= clip_high or p <= q, else D <= clip_low or p >= q,  p = exp(logprob), q = exp(old)
//              tv: D = |p - q|   kl: D = q log(q / p) + (1 - q) log((1 - q) / (1 - p))
//   vespo      -sg(phi) A logprob,  phi = exp(lambda + k log w - lambda w),  (k, lambda) by the sign of A
//              log w = sum of clamp(x, +-20) over the sequence    -phi A
//
//   l and its derivative are then multiplied by the sampler's weight u = exp(old - sampler), of the token or (the sum)
//   of the sequence, min(u, cap) or 0 where u > cap; vespo and gmpo take it into w and, by its geometric mean, into R.
//   + kl_coef kl(logprob, ref)                                    + kl_coef kl'
//   - entropy_coef entropy                                        by the entropy: -entropy_coef
#pragma once

#include <cmath>

#include "rlkernels/kl.h"
#include "rlkernels/math.h"
#include "rlkernels/sequences.h"

namespace rlk {

enum Objective {
  kPpo = 0,
  kReinforce = 1,
  kGspo = 2,
  kCispo = 3,
  kSapo = 4,
  kGmpo = 5,
  kDppoTv = 6,
  kDppoKl = 7,
  kVespo = 8,
};
constexpr int kObjectives = 9;
enum SamplerCorrection { kTokenTruncate = 0, kTokenMask = 1, kSequenceTruncate = 2, kSequenceMask = 3 };

// In the order of policy_loss.metrics; all but the last are means over scored tokens.
enum PolicyMetric {
  kRatioMean = 0,
  kClipLow = 1,
  kClipHigh = 2,
  kApproxKl = 3,
  kRefKl = 4,
  kEntropy = 5,
  kSamplerWeight = 6,
  kSamplerCapped = 7,
  kNumTokens = 8,
};
constexpr int kPolicyMeans = kNumTokens, kPolicyMetrics = kNumTokens + 1;

struct PolicyOptions {
  int objective, kl_estimator, sampler_correction;
  bool kl_straight_through;
  bool has_ref, has_sampler, has_entropy;
  bool has_dual_clip, has_delta, has_log_ratio_clamp;
  float clip_low, clip_high;
  float ratio_min, ratio_max;  // 1 - clip_low, 1 + clip_high, rounded once from double
  float dual_clip, delta, log_ratio_clamp, kl_coef, entropy_coef, sampler_cap;
  float log_sampler_cap;
  float k_pos, k_neg, rate_pos, rate_neg;  // vespo: k and lambda; sapo: the rates are its temperatures

  // Whether each token's loss takes numbers of its whole sequence, which must have been read before.
  RLK_HD bool sequence_objective() const { return objective == kGspo || objective == kGmpo || objective == kVespo; }
  RLK_HD bool sequence_weight() const { return has_sampler && sampler_correction >= kSequenceTruncate; }
  RLK_HD bool needs_sequences() const { return sequence_objective() || sequence_weight(); }
};

inline PolicyOptions make_policy_options(int objective, double clip_low, double clip_high, double dual_clip,
                                         double delta, double log_ratio_clamp, double k_pos, double k_neg,
                                         double rate_pos, double rate_neg, double kl_coef, int kl_estimator,
                                         bool kl_straight_through, double entropy_coef, int sampler_correction,
                                         double sampler_cap) {
  constexpr double kInfinite = std::numeric_limits<double>::infinity();
  PolicyOptions o = {};
  o.objective = objective;
  o.kl_estimator = kl_estimator;
  o.sampler_correction = sampler_correction;
  o.kl_straight_through = kl_straight_through;
  o.has_dual_clip = dual_clip < kInfinite;
  o.has_delta = delta < kInfinite;
  o.has_log_ratio_clamp = log_ratio_clamp < kInfinite;
  o.clip_low = static_cast<float>(clip_low);
  o.clip_high = static_cast<float>(clip_high);
  o.ratio_min = static_cast<float>(1.0 - clip_low);
  o.ratio_max = static_cast<float>(1.0 + clip_high);
  o.dual_clip = static_cast<float>(dual_clip);
  o.delta = static_cast<float>(delta);
  o.log_ratio_clamp = static_cast<float>(log_ratio_clamp);
  o.kl_coef = static_cast<float>(kl_coef);
  o.entropy_coef = static_cast<float>(entropy_coef);
  o.sampler_cap = static_cast<float>(sampler_cap);
  o.log_sampler_cap = static_cast<float>(std::log(sampler_cap));
  o.k_pos = static_cast<float>(k_pos);
  o.k_neg = static_cast<float>(k_neg);
  o.rate_pos = static_cast<float>(rate_pos);
  o.rate_neg = static_cast<float>(rate_neg);
  return o;
}

// What the kernels of a device read. Its arrays are pointers, or pointers with a dtype.
template <class Array, class FlagArray>
struct PolicyInputs {
  Array logprobs;          // [tokens], as are the four below and mask
  Array old_logprobs;      // or null: logprobs
  Array ref_logprobs;      // or null
  Array sampler_logprobs;  // or null
  Array entropy;           // or null
  FlagArray mask;          // or null: every token is scored
  Array advantages;        // [tokens] or [sequences]
  bool advantage_per_token;
  Sequences sequences;
};

struct PolicyResults {
  float *loss, *metrics, *scale;
  float *gradient, *entropy_gradient;  // [tokens], or null: not wanted
};

// What the loss reads of one scored token. An input that was not given holds anything finite.
template <class F>
struct TokenInputs {
  F logprob, old_logprob, ref_logprob, sampler_logprob, entropy, advantage;
};

template <class F>
struct TokenLoss {
  F loss, derivative;
  F ratio, clipped_low, clipped_high, approx_kl, ref_kl, weight, capped;  // clipped_*, capped: 0 or 1
};

// Weights whose logarithms are added up are at least 1e-8 and at most exp(20).
constexpr float kLeastLog = -18.420680743952367f, kLargestLog = 20.0f;

RLK_HD double clamp_log(double x) { return clamp<double>(x, kLeastLog, kLargestLog); }

// A token that the sampler gave no number for counts as it is.
template <class F>
RLK_HD F sampler_log_weight(F old_logprob, F sampler_logprob) {
  F difference = old_logprob - sampler_logprob;
  return select(difference == difference, difference, F(0));
}

// What is added up over the scored tokens of a sequence.
template <class F>
struct SequenceTerms {
  F log_ratio, log_weight;
};

// Takes of x the logprob and the advantage only where the objective needs them.
template <class F>
RLK_HD SequenceTerms<F> policy_sequence_terms(const PolicyOptions& o, const TokenInputs<F>& x) {
  SequenceTerms<F> terms = {F(0), F(0)};
  const F raw = x.logprob - x.old_logprob;
  if (o.objective == kGspo) {
    terms.log_ratio = raw;
  } else if (o.objective == kGmpo) {
    const F from_above = select(raw > F(o.clip_high), F(o.clip_high), raw);
    const F from_below = select(raw < F(-o.clip_low), F(-o.clip_low), raw);
    terms.log_ratio = select(x.advantage > F(0), from_above, select(x.advantage < F(0), from_below, F(0)));
  } else if (o.objective == kVespo) {
    terms.log_ratio = clamp(raw, F(-20), F(20));
  }
  if (o.has_sampler) {
    const F d = sampler_log_weight(x.old_logprob, x.sampler_logprob);
    if (o.sampler_correction >= kSequenceTruncate) {
      terms.log_weight = d;
    } else {
      const F beyond = o.sampler_correction == kTokenMask ? F(kLeastLog) : F(o.log_sampler_cap);
      terms.log_weight = clamp(select(d > F(o.log_sampler_cap), beyond, d), F(kLeastLog), F(kLargestLog));
    }
  }
  return terms;
}

// What each token of a sequence takes of the whole of it.
struct SequenceFactors {
  float length;                // the number of scored tokens
  float advantage;             // gmpo: the mean
  float ratio_pos, ratio_neg;  // gspo, gmpo: the ratio; vespo: phi where A >= 0 and where A < 0
  float unclamped;             // 1, or 0 where log_ratio_clamp took effect
  float weight, capped;        // the sampler's, where it is one a sequence (gmpo: always), else 1 and 0
};

// The sums are those of policy_sequence_terms and of the advantages. In double: exp makes a relative error of an
// absolute one.
RLK_HD SequenceFactors policy_sequence_factors(const PolicyOptions& o, double length, double log_ratio,
                                               double log_weight, double advantage) {
  const double n = length > 0.0 ? length : 1.0;
  SequenceFactors s = {static_cast<float>(length), static_cast<float>(advantage / n), 1.0f, 1.0f, 1.0f, 1.0f, 0.0f};
  double log_total = log_weight;  // of all the weights of the sequence, as they are applied
  if (o.sequence_weight()) {
    const bool capped = log_weight > o.log_sampler_cap, dropped = capped && o.sampler_correction == kSequenceMask;
    s.capped = capped ? 1.0f : 0.0f;
    s.weight = dropped ? 0.0f : capped ? o.sampler_cap : static_cast<float>(::exp(log_weight));
    log_total = dropped ? kLeastLog : clamp_log(capped ? o.log_sampler_cap : log_weight);
  } else if (o.has_sampler && o.objective == kGmpo) {
    s.weight = static_cast<float>(::exp(log_weight / n));
  }
  if (o.objective == kVespo) {
    const double log_w = clamp_log(log_ratio + log_total), w = ::exp(log_w);
    s.ratio_pos = static_cast<float>(::exp(o.rate_pos + o.k_pos * log_w - o.rate_pos * w));
    s.ratio_neg = static_cast<float>(::exp(o.rate_neg + o.k_neg * log_w - o.rate_neg * w));
  } else if (o.sequence_objective()) {
    const double mean = log_ratio / n, bounded = clamp<double>(mean, -o.log_ratio_clamp, o.log_ratio_clamp);
    s.ratio_pos = s.ratio_neg = static_cast<float>(::exp(bounded));
    s.unclamped = mean == bounded ? 1.0f : 0.0f;
  }
  return s;
}

// The objective is a template's argument, so that a loop over tokens holds the arithmetic of one alone.
template <int kObjective, class F>
RLK_HD TokenLoss<F> policy_token_loss(const PolicyOptions& o, const TokenInputs<F>& x, const SequenceFactors& s) {
  TokenLoss<F> t;
  const F zero = F(0), one = F(1), A = x.advantage;
  const F raw = x.logprob - x.old_logprob;
  const F d = o.has_log_ratio_clamp ? clamp(raw, F(-o.log_ratio_clamp), F(o.log_ratio_clamp)) : raw;
  const Exponentials<F> of_d = exponentials(d);
  t.ratio = of_d.exp;
  t.approx_kl = of_d.expm1 - d;
  t.clipped_low = zero;
  t.clipped_high = zero;

  F gain, slope;  // -l, -dl/dlogprob
  if constexpr (kObjective == kPpo || kObjective == kGspo) {
    if constexpr (kObjective == kGspo) t.ratio = F(s.ratio_pos);
    const F clipped_ratio = clamp(t.ratio, F(o.ratio_min), F(o.ratio_max));
    const F clipped = clipped_ratio * A;
    F free = t.ratio * A, clipped_slope = zero;
    slope = free;
    if (o.has_delta) {
      // Above delta the clipped term can be the smaller within the clips, too.
      clipped_slope = select(clipped_ratio == t.ratio, free, zero);
      slope = select(t.ratio > F(o.delta), zero, slope);
      free = select(t.ratio > F(o.delta), F(o.delta) * A, free);
    }
    gain = select(clipped < free, clipped, free);
    slope = select(clipped < free, clipped_slope, slope);
    if (o.has_dual_clip) {
      const F least = F(o.dual_clip) * A;
      const F bounded = select(gain < least, least, gain);
      slope = select(A < zero, select(gain < least, zero, slope), slope);
      gain = select(A < zero, bounded, gain);
    }
    if constexpr (kObjective == kGspo)
      slope = slope * F(s.unclamped);
    else if (o.has_log_ratio_clamp)
      slope = select(abs(raw) > F(o.log_ratio_clamp), zero, slope);
    t.clipped_low = select(t.ratio < F(o.ratio_min), select(A < zero, one, zero), zero);
    t.clipped_high = select(t.ratio > F(o.ratio_max), select(A > zero, one, zero), zero);
  } else if constexpr (kObjective == kSapo) {
    const F tau = select(A > zero, F(o.rate_pos), F(o.rate_neg));
    const F z = tau * (t.ratio - one);
    const F e = exp(-abs(z)), larger = one / (one + e);
    gain = select(z < zero, e * larger, larger) * (F(4) / tau) * A;
    // Where exp(-z) is 0 in float32, r may be infinite.
    slope = select(z > F(110), zero, F(4) * e * larger * larger * t.ratio * A);
    if (o.has_log_ratio_clamp) slope = select(abs(raw) > F(o.log_ratio_clamp), zero, slope);
  } else if constexpr (kObjective == kGmpo) {
    t.ratio = F(s.ratio_pos);
    gain = t.ratio * F(s.advantage);
    t.clipped_low = select(raw < F(-o.clip_low), select(A < zero, one, zero), zero);
    t.clipped_high = select(raw > F(o.clip_high), select(A > zero, one, zero), zero);
    slope = select(t.clipped_low + t.clipped_high > zero, zero, gain * F(s.unclamped));
    slope = select(A == zero, zero, slope);
  } else {
    F weight = one;  // of a plain policy gradient
    if constexpr (kObjective == kCispo) {
      weight = clamp(t.ratio, F(o.ratio_min), F(o.ratio_max));
      t.clipped_low = select(t.ratio < F(o.ratio_min), one, zero);
      t.clipped_high = select(t.ratio > F(o.ratio_max), one, zero);
    } else if constexpr (kObjective == kDppoTv || kObjective == kDppoKl) {
      const F p = exp(x.logprob), q = exp(x.old_logprob);
      F up = p - q, down = q - p;  // how far the probability has gone up, or down; trusted while <= its clip
      if constexpr (kObjective == kDppoKl) {
        const F not_p = F(1e-8f) - expm1(x.logprob), not_q = F(1e-8f) - expm1(x.old_logprob);
        const F divergence = (one - q) * log(not_q / not_p) - q * raw;
        up = select(p <= q, zero, divergence);
        down = select(p >= q, zero, divergence);
      }
      t.clipped_high = select(A > zero, select(up <= F(o.clip_high), zero, one), zero);
      t.clipped_low = select(A < zero, select(down <= F(o.clip_low), zero, one), zero);
      weight = o.has_delta ? select(t.ratio > F(o.delta), F(o.delta), t.ratio) : t.ratio;
      weight = select(t.clipped_low + t.clipped_high > zero, zero, weight);
    } else if constexpr (kObjective == kVespo) {
      weight = t.ratio = select(A < zero, F(s.ratio_neg), F(s.ratio_pos));
    }
    slope = weight * A;
    gain = slope * x.logprob;
  }

  t.weight = one;
  t.capped = zero;
  if (o.has_sampler) {
    if (o.sequence_weight()) {
      t.weight = F(s.weight);
      t.capped = F(s.capped);
    } else {
      const F log_weight = sampler_log_weight(x.old_logprob, x.sampler_logprob);
      t.capped = select(log_weight > F(o.log_sampler_cap), one, zero);
      t.weight = select(log_weight > F(o.log_sampler_cap), o.sampler_correction == kTokenMask ? zero : F(o.sampler_cap),
                        exp(log_weight));
    }
    if constexpr (kObjective != kVespo) {
      const F weight = kObjective == kGmpo ? F(s.weight) : t.weight;
      // What is dropped leaves no trace, also where it is infinite.
      gain = select(weight == zero, zero, weight * gain);
      slope = select(weight == zero, zero, weight * slope);
    }
  }

  t.loss = -gain;
  t.derivative = -slope;
  t.ref_kl = zero;
  if (o.has_ref) {
    const F d_ref = x.logprob - x.ref_logprob;
    t.ref_kl = kl_estimate(o.kl_estimator, d_ref);
    // A coefficient of 0 leaves the loss alone, also where the estimate overflows.
    if (o.kl_coef != 0.0f) {
      t.loss = t.loss + F(o.kl_coef) * t.ref_kl;
      t.derivative = t.derivative + F(o.kl_coef) * kl_estimate_derivative(o.kl_estimator, o.kl_straight_through, d_ref);
    }
  }
  if (o.has_entropy && o.entropy_coef != 0.0f) t.loss = t.loss - F(o.entropy_coef) * x.entropy;
  return t;
}

}  // namespace rlk
