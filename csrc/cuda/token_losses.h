// The gradients of a loss over tokens: what a kernel left, times the scale that it left and the loss's own gradient.
#pragma once

#include "inputs.h"
#include "launch.h"

namespace rlk {

struct ScaledGradient {
  const float* gradient;
  FloatsOut result;
  int64_t count;
};

// Both in one launch.
void launch_token_loss_backward(Launcher& launch, const ScaledGradient& by_logprobs, const ScaledGradient& by_entropy,
                                const float* scale, const float* grad_loss);

}  // namespace rlk
