// recurrence: gae, discounted_returns, td_lambda and vtrace as one linear recurrence, y[t] = b[t] + a[t] y[t+1], where
// t+1 is the next scored token.
#pragma once

#include "rlkernels/math.h"
#include "rlkernels/sequences.h"

namespace rlk {

enum RecurrenceKind { kGae = 0, kDiscountedReturns = 1, kTdLambda = 2, kVtrace = 3 };

RLK_HD bool has_advantages(int kind) { return kind == kGae || kind == kVtrace; }

// Whether y behind a sequence's last token is the bootstrap value, as returns are, or 0, as advantages are.
RLK_HD bool starts_with_bootstrap(int kind) { return !has_advantages(kind); }

struct RecurrenceOptions {
  float next_value_weight;  // gamma, but gamma (1 - lam) in td_lambda
  float decay;              // gamma lam, but gamma in discounted_returns
  float gamma, rho_clip, c_clip;
};

inline RecurrenceOptions make_recurrence_options(int kind, double gamma, double lam, double rho_clip, double c_clip) {
  RecurrenceOptions o;
  o.next_value_weight = static_cast<float>(kind == kTdLambda ? gamma * (1.0 - lam) : gamma);
  o.decay = static_cast<float>(kind == kDiscountedReturns ? gamma : gamma * lam);
  o.gamma = static_cast<float>(gamma);
  o.rho_clip = static_cast<float>(rho_clip);
  o.c_clip = static_cast<float>(c_clip);
  return o;
}

// What the kernels of a device read. Its arrays are pointers, or pointers with a dtype.
template <class Array, class FlagArray>
struct RecurrenceInputs {
  Array rewards;   // [tokens], as are values, the log-probabilities, mask and dones
  Array values;    // null for discounted_returns
  Array logprobs;  // null but for vtrace, as is behavior_logprobs
  Array behavior_logprobs;
  FlagArray mask;          // or null: every token is scored
  FlagArray dones;         // or null: no episode ends but with its sequence
  Array bootstrap_values;  // [sequences], or null: 0
  Sequences sequences;
};

// What a scored token adds to the recurrence, and rho, which is 1 but in vtrace.
template <class F>
struct RecurrenceTerm {
  F a, b, rho;
};

// gae:     b = r + gamma v' - v                a = gamma lam                   y = advantage
// returns: b = r                               a = gamma                       y = return
// td:      b = r + gamma (1 - lam) v'          a = gamma lam                   y = return
// vtrace:  b = rho (r + gamma v' - v)          a = gamma lam min(c_clip, w)    y = vs - v,  w = exp(logprob - behavior)
// At an episode's end v' is 0, and a is 0.
template <class F>
RLK_HD RecurrenceTerm<F> recurrence_term(const RecurrenceOptions& o, int kind, F reward, F value, F next_value,
                                         F logprob, F behavior_logprob) {
  RecurrenceTerm<F> term = {F(o.decay), reward, F(1.0f)};
  if (kind == kTdLambda) term.b = reward + F(o.next_value_weight) * next_value;
  if (has_advantages(kind)) term.b = (reward - value) + F(o.next_value_weight) * next_value;
  if (kind == kVtrace) {
    const F ratio = exp(logprob - behavior_logprob);
    term.rho = select(ratio > F(o.rho_clip), F(o.rho_clip), ratio);
    term.a = F(o.decay) * select(ratio > F(o.c_clip), F(o.c_clip), ratio);
    term.b = term.rho * term.b;
  }
  return term;
}

// y_next is that of the next scored token, 0 at an episode's end.
// vtrace: rho (r + gamma vs' - v) with vs' = v' + y'
template <class F>
RLK_HD F recurrence_advantage(const RecurrenceOptions& o, int kind, const RecurrenceTerm<F>& term, F y, F y_next) {
  return kind == kVtrace ? term.b + term.rho * F(o.gamma) * y_next : y;
}

template <class F>
RLK_HD F recurrence_return(int kind, F value, F y) {
  return has_advantages(kind) ? value + y : y;
}

// (A - mean) / sqrt(variance + 1e-8), of advantages in the unit of whitening_unit.
struct AdvantageWhitening {
  float unit, mean, scale;
};

// From the sums over `count` > 1 advantages and their squares. In double, in which a float's square is exact.
RLK_HD AdvantageWhitening advantage_whitening(double count, double sum, double squares) {
  const double mean = sum / count, rest = squares - sum * mean;
  const double std = sqrt((rest < 0.0 ? 0.0 : rest) / (count - 1.0) + 1e-8);
  const double unit = whitening_unit(std);
  return {static_cast<float>(unit), static_cast<float>(mean * unit), static_cast<float>(1.0 / (std * unit))};
}

template <class F>
RLK_HD F whiten_advantage(const AdvantageWhitening& w, F advantage) {
  return (advantage * F(w.unit) - F(w.mean)) * F(w.scale);
}

}  // namespace rlk
