#pragma once

#include "kernels.h"
#include "rlkernels/policy_loss.h"

namespace rlk {

struct PolicyLoss : PolicyInputs<const float*, const bool*> {
  bool mean_over_sequence;  // divide a token's loss by the number of scored tokens in its sequence
  PolicyOptions options;
};

// Over the scored tokens of a block: the loss, what policy_loss.metrics averages, in its order, and their number.
struct PolicySums {
  double loss, means[kPolicyMeans], tokens;
};

template <Isa>
struct PolicyLossKernels {
  // Sequences [begin, end): their number of scored tokens, and what each of them takes of the whole.
  static void policy_loss_sequences(const PolicyLoss& problem, SequenceFactors* factors, int64_t begin, int64_t end);
  // Blocks [begin, end). `factors` may be null where nothing is taken of a sequence. The gradients [tokens] are by
  // logprobs and by entropy, before the division by the loss's denominator; null where not wanted.
  static void policy_loss_sums(const PolicyLoss& problem, const SequenceFactors* factors, PolicySums* sums,
                               float* gradient, float* entropy_gradient, int64_t begin, int64_t end);
};

}  // namespace rlk
