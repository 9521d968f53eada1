// token_logprobs: log-probability and entropy of one row of logits, and their gradient.
#pragma once

#include "rlkernels/math.h"

namespace rlk {

// z = softcap * tanh(x / softcap) / temperature; softcap 0 means none.
template <class F>
RLK_HD F scaled_logit(F x, F softcap, F temperature, bool capped) {
  return (capped ? softcap * tanh(x / softcap) : x) / temperature;
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
  return {m, a.s * ca + b.s * cb, (a.w + a.s * da) * ca + (b.w + b.s * db) * cb};
}

template <class F>
struct RowResult {
  F logprob, entropy, lse;
};

// From the sums over all logits but the target's. With L = logsumexp of the others:
//   logprob = z_t - logaddexp(L, z_t) = -softplus(L - z_t)
// which is exact for confident tokens, where z_t - logsumexp would round to 0. The entropy is a sum of terms >= 0:
//   H = -p_t log p_t + sum_{v != t} p_v (lse - z_v),   z_v = m + (z_v - m)
template <class F>
RLK_HD RowResult<F> finish_row(RowSums<F> others, F z_target) {
  const F infinity = F(std::numeric_limits<float>::infinity());
  const F nan = F(std::numeric_limits<float>::quiet_NaN());
  F lse_others = select(others.s == F(0), -infinity, others.m + log(others.s));
  F x = lse_others - z_target;
  F tail = log1p(exp(-abs(x)));
  F logprob = -(select(x > F(0), x, F(0)) + tail);
  F lse = select(x > F(0), lse_others, z_target) + tail;
  // log-softmax is undefined beside a +inf, and x is NaN where there is nothing but -inf.
  bool undefined = (lse_others == infinity) || (z_target == infinity) || (x != x);
  logprob = select(undefined, nan, logprob);
  lse = select(undefined, nan, lse);

  F p_target = exp(logprob);
  F entropy = select(p_target == F(0), F(0), -(p_target * logprob));
  F unit = exp(others.m - lse);
  entropy += select(others.s == F(0), F(0), unit * (others.s * (lse - others.m) - others.w));
  return {logprob, select(undefined, nan, entropy), lse};
}

// d(grad_logprob * logprob + grad_entropy * H) / dz_v for v other than the target, p = exp(z - lse):
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
