// What the losses over tokens share: how the losses of tokens become one.
#pragma once

#include "rlkernels/math.h"

namespace rlk {

enum Aggregation { kTokenMean = 0, kSeqMeanTokenMean = 1, kSeqMeanTokenSum = 2, kTokenSum = 3 };

// What divides the sum of the losses: the normalizer where one is given, else a count.
struct Denominator {
  bool has_normalizer;
  float normalizer;  // of a tensor on a GPU: what the kernel reads there
  int aggregation;

  RLK_HD bool counts_sequences() const {
    return !has_normalizer && (aggregation == kSeqMeanTokenMean || aggregation == kSeqMeanTokenSum);
  }
  // Whether a token's loss is divided by the number of scored tokens in its sequence.
  RLK_HD bool mean_over_sequence() const { return aggregation == kSeqMeanTokenMean; }
  // Whether the scored tokens of each sequence must be counted before the losses are added up.
  RLK_HD bool needs_lengths() const { return mean_over_sequence() || counts_sequences(); }
  RLK_HD double operator()(double tokens, double sequences) const {
    if (has_normalizer) return normalizer;
    if (aggregation == kTokenMean) return tokens;
    return aggregation == kTokenSum ? 1.0 : sequences;
  }
};

}  // namespace rlk
