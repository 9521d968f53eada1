// masked_whiten: the moments of scored elements, combined from parts, and one element whitened by them.
#pragma once

#include <cmath>
#include <cstdint>

#include "rlkernels/math.h"

namespace rlk {

// What describes some elements: how many there are, their mean, and the sum of their squared deviations from it.
struct Moments {
  double count, mean, squares;
};

// From the sums over deviations d = x - centre, where centre is about the mean of the elements. What the rounding of
// the centre left behind stands in the sum of d, so that nothing cancels. Without elements: NaN.
RLK_HD Moments moments_of(double count, double centre, double sum_d, double sum_d_squared) {
  const double rest = sum_d / count, squares = sum_d_squared - rest * sum_d;
  return {count, centre + rest, squares < 0.0 ? 0.0 : squares};
}

// The moments of the elements of both; b may have none.
RLK_HD Moments combine(const Moments& a, const Moments& b) {
  if (b.count == 0.0) return a;
  const double count = a.count + b.count, share = b.count / count, delta = b.mean - a.mean;
  return {count, a.mean + delta * share, a.squares + b.squares + delta * delta * a.count * share};
}

// The elements are in the unit of whitening_unit. The mean is in two floats, whose difference from an element keeps its
// digits also where the mean is large.
struct Whitening {
  float unit, mean_high, mean_low, scale, offset;
};

// eps is added to the variance, or, with eps_floor, the least that it may be.
inline Whitening whitening_of(const Moments& m, bool shift_mean, double eps, bool unbiased, bool eps_floor) {
  const double divisor = m.count - (unbiased ? 1.0 : 0.0), variance = m.squares / (divisor < 1.0 ? 1.0 : divisor);
  const double scaled = eps_floor ? (variance < eps ? eps : variance) : variance + eps;
  const double std = std::sqrt(scaled), unit = whitening_unit(std), mean = m.mean * unit;
  const float high = static_cast<float>(mean);
  return {static_cast<float>(unit), high, static_cast<float>(mean - high), static_cast<float>(1.0 / (std * unit)),
          shift_mean ? 0.0f : static_cast<float>(m.mean)};
}

template <class F>
RLK_HD F whiten(const Whitening& w, F x) {
  return ((x * F(w.unit) - F(w.mean_high)) - F(w.mean_low)) * F(w.scale) + F(w.offset);
}

}  // namespace rlk
