// What the CPU ops of the losses over tokens share: the sums of blocks become a loss.
#pragma once

#include "bindings.h"
#include "rlkernels/aggregation.h"

namespace rlk {

inline int64_t loss_blocks(int64_t tokens) { return (tokens + kLossBlock - 1) / kLossBlock; }

// Divides the sum of the losses, 0 where nothing is scored; the scale is what the gradients are yet to be multiplied
// by.
inline void divide_loss(double sum, double divisor, bool scored, float* loss, float* scale) {
  *loss = scored ? static_cast<float>(sum / divisor) : 0.0f;
  *scale = scored ? static_cast<float>(1.0 / divisor) : 0.0f;
}

}  // namespace rlk
