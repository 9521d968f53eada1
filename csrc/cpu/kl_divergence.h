#pragma once

#include "cpu/logprobs.h"

namespace rlk {

// Tiles of the logits of one model, and [2, rows] of its rows: the largest capped logit, and the logarithm of the sum
// of exp((y - largest) / temperature).
struct Distribution {
  LogitRows logits;
  const float* row_stats;
  float temperature, softcap;
};

struct KlDivergence {
  Distribution student, teacher;
  int kind;
  float beta, one_minus_beta;

  // Rows are cut at the same places whatever the number of threads.
  static constexpr int64_t kBlock = 4096;
  int64_t blocks_per_row() const { return (student.logits.vocab + kBlock - 1) / kBlock; }
};

struct DivergenceSums {
  double divergence, moment, total;
};

template <Isa>
struct KlDivergenceKernels {
  // Blocks [begin, end), counted row by row.
  static void kl_divergence_sums(const KlDivergence& problem, DivergenceSums* sums, int64_t begin, int64_t end);
  // The same; `gradient` may be the student's logits themselves. Rows whose grad is 0 get 0, whatever they hold.
  static void kl_divergence_backward(const KlDivergence& problem, const float* grad, const float* centre,
                                     const LogitRows& gradient, int64_t begin, int64_t end);
};

}  // namespace rlk
