#pragma once

#include "kernels.h"
#include "rlkernels/recurrence.h"

namespace rlk {

struct Recurrence : RecurrenceInputs<const float*, const bool*> {
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
