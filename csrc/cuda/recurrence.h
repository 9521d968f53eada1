// recurrence: what its kernels are launched with.
#pragma once

#include "inputs.h"
#include "launch.h"
#include "rlkernels/recurrence.h"
#include "rlkernels/sequences.h"

namespace rlk {

struct RecurrenceBatch {
  Floats rewards;   // [tokens], as are values, the log-probabilities, mask, dones and the results
  Floats values;    // null for discounted_returns
  Floats logprobs;  // null but for vtrace, as is behavior_logprobs
  Floats behavior_logprobs;
  Flags mask;               // or null: every token is scored
  Flags dones;              // or null: no episode ends but with its sequence
  Floats bootstrap_values;  // [sequences], or null: 0
  const float* valid;       // NaN where cu_seqlens are not; null without them
  Sequences sequences;
  RecurrenceOptions options;
  float* advantages;  // null where the kind has none
  float* returns;

  __device__ bool usable() const { return valid == nullptr || *valid == 1.0f; }
};

void launch_recurrence(Launcher& launch, RecurrenceBatch batch, int kind, bool whiten);

}  // namespace rlk
