#pragma once

#include "kernels.h"
#include "rlkernels/value_loss.h"

namespace rlk {

struct ValueLoss : ValueInputs<const float*, const bool*> {
  bool mean_over_sequence;  // divide a token's loss by the number of scored tokens in its sequence
  float clip;
};

template <Isa>
struct ValueLossKernels {
  // Sequences [begin, end): how many of their tokens are scored.
  static void value_loss_lengths(const ValueLoss& problem, int64_t* lengths, int64_t begin, int64_t end);
  // Blocks [begin, end). `lengths` may be null where no mean is taken over a sequence. `gradient` [tokens] is by
  // values, before the division by the loss's denominator; null where not wanted.
  static void value_loss_sums(const ValueLoss& problem, const int64_t* lengths, ValueSums* sums, float* gradient,
                              int64_t begin, int64_t end);
};

}  // namespace rlk
