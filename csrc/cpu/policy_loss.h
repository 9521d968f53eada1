#pragma once

#include "kernels.h"
#include "rlkernels/policy_loss.h"
#include "rlkernels/sequences.h"

namespace rlk {

struct PolicyLoss {
  const float* logprobs;      // [tokens], as are old_logprobs, ref_logprobs and mask
  const float* old_logprobs;  // or null: logprobs
  const float* ref_logprobs;  // or null
  const bool* mask;           // or null: every token is scored
  const float* advantages;    // [tokens] or [sequences]
  bool advantage_per_token;
  Sequences sequences;
  bool mean_over_sequence;  // divide a token's loss by the number of scored tokens in its sequence
  PolicyOptions options;

  // Tokens per partial sum: fixed, so that the sum is the same whatever the number of threads.
  static constexpr int64_t kBlock = 1024;
  int64_t blocks() const { return (sequences.tokens + kBlock - 1) / kBlock; }
};

// Over the scored tokens of a block: the loss, and what policy_loss.metrics averages, in its order.
struct PolicySums {
  double loss, metrics[kNumTokens];
};

template <Isa>
struct PolicyLossKernels {
  // Sequences [begin, end): how many of their tokens are scored.
  static void policy_loss_lengths(const PolicyLoss& problem, int64_t* lengths, int64_t begin, int64_t end);
  // Blocks [begin, end). `gradient` [tokens] is by logprobs, before the division by the loss's denominator.
  static void policy_loss_sums(const PolicyLoss& problem, const int64_t* lengths, PolicySums* sums, float* gradient,
                               int64_t begin, int64_t end);
};

}  // namespace rlk
