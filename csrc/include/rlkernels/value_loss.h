// value_loss: the loss of one token, its derivative by the token's value, and what the metrics are made of.
#pragma once

#include <limits>

#include "rlkernels/math.h"
#include "rlkernels/sequences.h"

namespace rlk {

// In the order of value_loss.metrics.
enum ValueMetric {
  kClipFraction = 0,
  kValueMean = 1,
  kReturnMean = 2,
  kSquaredError = 3,
  kExplainedVariance = 4,
  kValueTokens = 5,
};
constexpr int kValueMetrics = kValueTokens + 1;

// What the kernels of a device read. Its arrays are pointers, or pointers with a dtype.
template <class Array, class FlagArray>
struct ValueInputs {
  Array values;      // [tokens], as are old_values, returns and mask
  Array old_values;  // or null: not clipped
  Array returns;
  FlagArray mask;  // or null: every token is scored
  Sequences sequences;
};

struct ValueResults {
  float *loss, *metrics, *scale;
  float* gradient;  // [tokens], or null: not wanted
};

template <class F>
struct TokenValueLoss {
  F loss, derivative;
  F error, clipped;  // clipped: 0 or 1
};

// l = max((v - R)^2, (b - R)^2) / 2,  b = clamp(v, old - clip, old + clip)
// dl/dv = v - R where the first is the larger or they agree, else 0: there b is a constant
template <class F>
RLK_HD TokenValueLoss<F> value_token_loss(F value, F old_value, F target, bool has_old, F clip) {
  TokenValueLoss<F> t;
  t.error = value - target;
  t.loss = F(0.5f) * t.error * t.error;
  t.derivative = t.error;
  t.clipped = F(0);
  if (has_old) {
    const F bounded = clamp(value, old_value - clip, old_value + clip) - target;
    const F loss = F(0.5f) * bounded * bounded;
    t.clipped = select(loss > t.loss, F(1), F(0));
    t.derivative = select(loss > t.loss, F(0), t.error);
    t.loss = select(loss > t.loss, loss, t.loss);
  }
  return t;
}

// Over some scored tokens. In double, where the squares of floats are exact, so that a variance is the mean of squares
// less the square of the mean.
struct ValueSums {
  double loss, clipped, values, returns, return_squares, errors, error_squares, tokens;

  RLK_HD void add(const ValueSums& other) {
    loss += other.loss;
    clipped += other.clipped;
    values += other.values;
    returns += other.returns;
    return_squares += other.return_squares;
    errors += other.errors;
    error_squares += other.error_squares;
    tokens += other.tokens;
  }
};

RLK_HD void value_metrics(const ValueSums& sums, float* metrics) {
  const bool any = sums.tokens > 0.0;
  const double n = any ? sums.tokens : 1.0;
  const double mean = sums.returns / n, variance = sums.return_squares / n - mean * mean;
  const double error = sums.errors / n, error_variance = sums.error_squares / n - error * error;
  // What rounding alone can make of returns that are all the same.
  const double noise = 4.0 * std::numeric_limits<float>::epsilon() * mean;
  metrics[kClipFraction] = static_cast<float>(sums.clipped / n);
  metrics[kValueMean] = static_cast<float>(sums.values / n);
  metrics[kReturnMean] = static_cast<float>(mean);
  metrics[kSquaredError] = static_cast<float>(sums.error_squares / n);
  metrics[kExplainedVariance] = !any                        ? 0.0f
                                : variance <= noise * noise ? std::numeric_limits<float>::quiet_NaN()
                                                            : static_cast<float>(1.0 - error_variance / variance);
  metrics[kValueTokens] = static_cast<float>(sums.tokens);
}

}  // namespace rlk
