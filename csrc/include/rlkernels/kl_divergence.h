// kl_divergence: what one token of the vocabulary adds to a divergence between two distributions, p_S of a student and
// p_T of a teacher, and to its gradient.
#pragma once

#include "rlkernels/math.h"

namespace rlk {

enum KlKind { kForward = 0, kReverse = 1, kJensenShannon = 2 };

// The probabilities of one token, each from its logarithm, which has seen fewer roundings than d = log p_T - log p_S;
// their difference from d, as they may be nearly equal.
template <class F>
struct TokenPair {
  F d, student, teacher;
  F difference;                 // p_S - p_T
  Exponentials<F> of_distance;  // of -|d|
};

template <class F>
RLK_HD TokenPair<F> token_pair(F log_student, F log_teacher, F d) {
  const F infinity = F(std::numeric_limits<float>::infinity());
  // A token that neither has: the difference of two -inf would be NaN.
  d = select((log_student == -infinity) & (log_teacher == -infinity), F(0), d);
  auto teacher_leads = d >= F(0);
  F student = exp(log_student), teacher = exp(log_teacher);
  Exponentials<F> of_distance = exponentials(-abs(d));
  F difference = select(teacher_leads, teacher, -student) * of_distance.expm1;
  return {d, student, teacher, difference, of_distance};
}

// (exp(x) - 1 - x) / x^2 for |x| <= 1/2: the terms of its series that reach 2^-24 of the sum.
template <class F>
RLK_HD F exp_remainder(F x) {
  F r = F(1.0f / 40320);
  r = r * x + F(1.0f / 5040);
  r = r * x + F(1.0f / 720);
  r = r * x + F(1.0f / 120);
  r = r * x + F(1.0f / 24);
  r = r * x + F(1.0f / 6);
  return r * x + F(0.5f);
}

// p log(p / q) - p + q >= 0, from d = log(p / q) and gap = q - p.
template <class F>
RLK_HD F excess(F p, F d, F gap) {
  const F infinity = F(std::numeric_limits<float>::infinity());
  F value = select(abs(d) < F(0.5f), p * (d * d * exp_remainder(-d)), p * d + gap);
  // p = 0 times an infinite d is NaN. Where q alone is 0 the divergence is infinite, also if p has been rounded to 0.
  return select(d == infinity, infinity, select(p == F(0), gap, value));
}

// log(p_S / m) and log(p_T / m) for the mixture m = beta p_T + (1 - beta) p_S.
template <class F>
struct OverMixture {
  F student, teacher;
};

template <class F>
RLK_HD OverMixture<F> over_mixture(const TokenPair<F>& pair, F beta, F one_minus_beta) {
  auto teacher_leads = pair.d >= F(0);
  F distance = abs(pair.d);
  F of_larger = select(teacher_leads, beta, one_minus_beta), of_smaller = select(teacher_leads, one_minus_beta, beta);
  // m / larger = 1 + below, m / smaller = 1 + above. Nearly equal probabilities, and a beta near 0 or 1, keep their
  // digits where the logarithm of the one that is nearer to 1 is taken, and the other made of it.
  F below = of_smaller * pair.of_distance.expm1;
  F above = -(of_larger * pair.of_distance.expm1) / pair.of_distance.exp;
  auto by_smaller = of_smaller > of_larger;
  F x = select(by_smaller, above, below);
  auto far = x >= F(1);
  by_smaller = by_smaller & !far;
  // log(1 + x), with what the sum has rounded away.
  F sum = select(far, of_larger + of_smaller * pair.of_distance.exp, F(1) + x);
  F rounded_away = select(far, F(0), x - (sum - F(1)));
  F logarithm = log(sum) + rounded_away / sum;
  F over_larger = select(by_smaller, logarithm - distance, logarithm);
  F over_smaller = select(by_smaller, logarithm, logarithm + distance);
  return {-select(teacher_leads, over_smaller, over_larger), -select(teacher_leads, over_larger, over_smaller)};
}

// beta p_T log(p_T / m) + (1 - beta) p_S log(p_S / m) >= 0
template <class F>
RLK_HD F jensen_shannon(const TokenPair<F>& pair, OverMixture<F> over, F beta, F one_minus_beta) {
  F teacher = beta * pair.teacher, student = one_minus_beta * pair.student;
  F near = teacher * (over.teacher * over.teacher * exp_remainder(-over.teacher)) +
           student * (over.student * over.student * exp_remainder(-over.student));
  F far = select(teacher == F(0), F(0), teacher * over.teacher) + select(student == F(0), F(0), student * over.student);
  return select(abs(pair.d) < F(0.5f), near, far);
}

// p_S L, where p_S = 0 leaves nothing of an infinite L.
template <class F>
RLK_HD F student_times(const TokenPair<F>& pair, F l) {
  return select(pair.student == F(0), F(0), pair.student * l);
}

// What a token adds to a row's divergence, to the moment p_S - p_T (forward) or p_S L (else), and to the total of p_S.
template <class F>
struct DivergenceTerm {
  F divergence, moment, total;
};

template <class F>
RLK_HD DivergenceTerm<F> divergence_term(int kind, const TokenPair<F>& pair, F beta, F one_minus_beta) {
  if (kind == kForward) return {excess(pair.teacher, pair.d, pair.difference), pair.difference, pair.student};
  if (kind == kReverse)
    return {excess(pair.student, -pair.d, -pair.difference), student_times(pair, -pair.d), pair.student};
  const OverMixture<F> over = over_mixture(pair, beta, one_minus_beta);
  return {jensen_shannon(pair, over, beta, one_minus_beta), student_times(pair, over.student), pair.student};
}

// d(divergence)/dz_S: p_S - p_T - p_S centre; p_S (log(p_S / p_T) - centre); (1 - beta) p_S (log(p_S / m) - centre).
// The centre is the row's moment over its total. The first is 0 but for the rounding of the logarithms of the rows'
// sums, which it takes out, as do the others: where probabilities are nearly equal it would be seen.
template <class F>
RLK_HD F divergence_gradient(int kind, const TokenPair<F>& pair, F centre, F beta, F one_minus_beta) {
  if (kind == kForward) return pair.difference - pair.student * centre;
  if (kind == kReverse) return student_times(pair, -pair.d - centre);
  return one_minus_beta * student_times(pair, over_mixture(pair, beta, one_minus_beta).student - centre);
}

}  // namespace rlk
