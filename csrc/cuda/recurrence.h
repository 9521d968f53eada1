// recurrence: what its kernels are launched with.
#pragma once

#include "launch.h"
#include "rlkernels/recurrence.h"
#include "rlkernels/sequences.h"

namespace rlk {

struct RecurrenceBatch {
  const float* rewards;   // [tokens], as are values, the log-probabilities, mask, dones and the results
  const float* values;    // null for discounted_returns
  const float* logprobs;  // null but for vtrace, as is behavior_logprobs
  const float* behavior_logprobs;
  const bool* mask;               // or null: every token is scored
  const bool* dones;              // or null: no episode ends but with its sequence
  const float* bootstrap_values;  // [sequences], or null: 0
  const float* valid;             // NaN where cu_seqlens are not; null without them
  Sequences sequences;
  RecurrenceOptions options;
  float* advantages;  // null where the kind has none
  float* returns;

  __device__ bool usable() const { return valid == nullptr || *valid == 1.0f; }
  __device__ float bootstrap(int64_t s) const { return bootstrap_values != nullptr ? bootstrap_values[s] : 0.0f; }
};

void launch_recurrence(Launcher& launch, const RecurrenceBatch& batch, int kind, bool whiten);

}  // namespace rlk
