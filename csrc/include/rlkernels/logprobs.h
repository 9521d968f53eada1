// token_logprobs: log-probability and entropy of one row of logits, and their gradient.
#pragma once

#include "rlkernels/math.h"

namespace rlk {

// z = softcap * tanh(x / softcap) / temperature; softcap 0 means none.
template <class F>
RLK_HD F scaled_logit(F x, F softcap, F temperature, bool capped) {
  return (capped ? product(softcap, tanh(x / softcap)) : x) / temperature;
}

// dz/dx = (1 - tanh(x / softcap)^2) / temperature
template <class F>
RLK_HD F scaled_logit_derivative(F x, F softcap, F temperature, bool capped) {
  if (!capped) return F(1) / temperature;
  F t = tanh(x / softcap);
  return (F(1) - t * t) / temperature;
}

// Running sums over some logits z of a row: m = max z, s = sum exp(z - m), w = sum exp(z - m) (z - m).
// An empty sum is {-inf, 0, 0}.
template <class F>
struct RowSums {
  F m, s, w;
};

// The sums over two disjoint parts of a row. A part that is empty, or holds only -inf, contributes nothing; where a
// logit is +inf or NaN, s is NaN and stays so.
template <class F>
RLK_HD RowSums<F> merge(RowSums<F> a, RowSums<F> b) {
  const F infinity = F(std::numeric_limits<float>::infinity());
  F m = select(a.m < b.m, b.m, a.m);
  // A zero difference stands for -inf - -inf, which would be NaN; the sums it weighs are 0.
  F da = select(a.m == -infinity, F(0), a.m - m);
  F db = select(b.m == -infinity, F(0), b.m - m);
  F ca = select(a.m == -infinity, F(0), exp(da));
  F cb = select(b.m == -infinity, F(0), exp(db));
  // A sum that vanishes may lie so far below (a vocabulary masked by the lowest float) that its w overflows. One that
  // is NaN stays so.
  F wa = select((ca == F(0)) & (a.s == a.s), F(0), (a.w + a.s * da) * ca);
  F wb = select((cb == F(0)) & (b.s == b.s), F(0), (b.w + b.s * db) * cb);
  return {m, a.s * ca + b.s * cb, wa + wb};
}

// With max and log_sum, log p_v = (z_v - max) - log_sum. The pair is kept instead of its sum, logsumexp, because next
// to a large max the sum would lose log_sum's digits, and with them those of every p.
template <class F>
struct RowResult {
  F logprob, entropy, max, log_sum;
};

template <class F>
RLK_HD F row_log_p(F z, F max, F log_sum) {
  return (z - max) - log_sum;
}

// From the sums over all logits but the target's. With L = logsumexp of the others:
//   logprob = z_t - logaddexp(L, z_t) = -softplus(L - z_t)
// which is exact for confident tokens, where z_t - logsumexp would round to 0. The entropy is a sum of terms >= 0:
//   H = -p_t log p_t + sum_{v != t} p_v (-log p_v)
template <class F>
RLK_HD RowResult<F> finish_row(RowSums<F> others, F z_target) {
  const F infinity = F(std::numeric_limits<float>::infinity());
  const F nan = F(std::numeric_limits<float>::quiet_NaN());
  F x = (others.m - z_target) + log(others.s);
  // Log-softmax is undefined where there is a +inf, and x is NaN where there is nothing but -inf.
  if (others.m == infinity || z_target == infinity || x != x) return {nan, nan, nan, nan};
  RowResult<F> row;
  row.logprob = -(select(x > F(0), x, F(0)) + log1p(exp(-abs(x))));
  bool target_leads = z_target >= others.m;
  row.max = target_leads ? z_target : others.m;
  row.log_sum = target_leads ? -row.logprob : log(others.s + exp(z_target - others.m));

  F p_target = exp(row.logprob);
  row.entropy = p_target == F(0) ? F(0) : -(p_target * row.logprob);
  if (others.s > F(0)) {
    F below = (row.max - others.m) + row.log_sum;  // -log p of the largest of the others
    row.entropy += exp(-below) * (others.s * below - others.w);
  }
  return row;
}

// d(grad_logprob * logprob + grad_entropy * H) / dz_v for v other than the target, log_p = row_log_p:
//   -grad_logprob * p - grad_entropy * p (log p + H)
template <class F>
RLK_HD F row_gradient(F log_p, F entropy, F grad_logprob, F grad_entropy, bool has_entropy) {
  F p = exp(log_p);
  F weight = grad_logprob;
  if (has_entropy) weight += grad_entropy * (log_p + entropy);
  return select(p == F(0), F(0), -(p * weight));
}

// The same for v = target, where 1 - p = -expm1(logprob).
template <class F>
RLK_HD F row_gradient_target(F logprob, F entropy, F grad_logprob, F grad_entropy, bool has_entropy) {
  F gradient = -(grad_logprob * expm1(logprob));
  if (has_entropy) {
    F p = exp(logprob);
    gradient -= select(p == F(0), F(0), grad_entropy * p * (logprob + entropy));
  }
  return gradient;
}

}  // namespace rlk
