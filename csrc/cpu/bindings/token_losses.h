// What the CPU ops of the losses over tokens share: the sums of blocks become a loss.
#pragma once

#include "bindings.h"
#include "rlkernels/aggregation.h"

namespace rlk {

inline Denominator denominator_of(const std::optional<Tensor>& normalizer, double normalizer_value,
                                  int64_t aggregation) {
  const float value = normalizer ? *normalizer->const_data_ptr<float>() : static_cast<float>(normalizer_value);
  return {normalizer || value > 0.0f, value, static_cast<int>(aggregation)};
}

inline int64_t loss_blocks(int64_t tokens) { return (tokens + kLossBlock - 1) / kLossBlock; }

// An output that nobody asked for is empty.
inline Tensor gradient_like(const Tensor& tensor, bool wanted) {
  return wanted ? empty_floats(tensor.sizes()) : empty_floats({0});
}

inline float* gradient_or_null(Tensor& gradient, bool wanted) {
  return wanted ? gradient.mutable_data_ptr<float>() : nullptr;
}

// Divides the sum of the losses, 0 where nothing is scored; the scale is what the gradients are yet to be multiplied
// by.
inline void divide_loss(double sum, double divisor, bool scored, Tensor& loss, Tensor& scale) {
  *loss.mutable_data_ptr<float>() = scored ? static_cast<float>(sum / divisor) : 0.0f;
  *scale.mutable_data_ptr<float>() = scored ? static_cast<float>(1.0 / divisor) : 0.0f;
}

}  // namespace rlk
