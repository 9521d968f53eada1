// What the losses over tokens share: how the losses of tokens become one.
#pragma once

#include "rlkernels/math.h"

namespace rlk {

enum Aggregation { kTokenMean = 0, kSeqMeanTokenMean = 1, kSeqMeanTokenSum = 2, kTokenSum = 3 };

// What divides the sum of the losses: *normalizer or normalizer_value where given (not null, not 0), else a count.
struct Denominator {
  const float* normalizer;
  float normalizer_value;
  int aggregation;

  RLK_HD bool counts_sequences() const {
    return normalizer == nullptr && normalizer_value == 0.0f &&
           (aggregation == kSeqMeanTokenMean || aggregation == kSeqMeanTokenSum);
  }
  // Whether the scored tokens of each sequence must be counted before the losses are added up.
  RLK_HD bool needs_lengths() const { return aggregation == kSeqMeanTokenMean || counts_sequences(); }
  RLK_HD double operator()(double tokens, double sequences) const {
    if (normalizer != nullptr) return *normalizer;
    if (normalizer_value > 0.0f) return normalizer_value;
    if (aggregation == kTokenMean) return tokens;
    return aggregation == kTokenSum ? 1.0 : sequences;
  }
};

}  // namespace rlk
