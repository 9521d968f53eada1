#pragma once

#include "kernels.h"
#include "rlkernels/recurrence.h"
#include "rlkernels/sequences.h"

namespace rlk {

struct Recurrence {
  const float* rewards;   // [tokens], as are values, the log-probabilities, mask and dones
  const float* values;    // null for discounted_returns
  const float* logprobs;  // null but for vtrace, as is behavior_logprobs
  const float* behavior_logprobs;
  const bool* mask;               // or null: every token is scored
  const bool* dones;              // or null: no episode ends but with its sequence
  const float* bootstrap_values;  // [sequences], or null: 0
  Sequences sequences;
  int kind;
  RecurrenceOptions options;
};

// Sums over a sequence's advantages. They are in double, in which a float's square is exact.
struct AdvantageSums {
  int64_t count;
  double sum, squares;
};

template <Isa>
struct RecurrenceKernels {
  // Sequences that start at tokens [begin, end). advantages is null where the kind has none, sums [sequences] where
  // nobody asked for them.
  static void recurrence(const Recurrence& problem, float* advantages, float* returns, AdvantageSums* sums,
                         int64_t begin, int64_t end);
  // Tokens [begin, end): (advantage - mean) * scale where scored.
  static void whiten(const Recurrence& problem, const AdvantageWhitening& whitening, float* advantages, int64_t begin,
                     int64_t end);
};

}  // namespace rlk
