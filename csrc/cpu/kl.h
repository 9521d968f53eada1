#pragma once

#include "kernels.h"

namespace rlk {

struct KlPenalty {
  int estimator;
  bool straight_through;
  float log_ratio_clamp, value_clamp;
};

template <Isa>
struct KlKernels {
  // Elements [begin, end).
  static void kl_penalty_forward(const KlPenalty& options, const float* logprobs, const float* ref_logprobs,
                                 float* penalty, int64_t begin, int64_t end);
  static void kl_penalty_backward(const KlPenalty& options, const float* grad, const float* logprobs,
                                  const float* ref_logprobs, float* grad_logprobs, int64_t begin, int64_t end);
};

}  // namespace rlk
