// What the launchers of the losses over tokens share.
#pragma once

#include "launch.h"
#include "token_losses.cuh"

namespace rlk {

constexpr int kSequenceThreads = 128;
constexpr int kFinishThreads = kWarp * kMaxWarps;

inline Denominator denominator_of(const std::optional<Tensor>& normalizer, double normalizer_value,
                                  int64_t aggregation) {
  return {data_or_null<float>(normalizer), static_cast<float>(normalizer_value), static_cast<int>(aggregation)};
}

// Floats for `count` values of type T.
template <typename T>
Tensor empty_for(const Tensor& like, int64_t count) {
  static_assert(sizeof(T) % sizeof(float) == 0);
  return empty_like(like, {count, static_cast<int64_t>(sizeof(T) / sizeof(float))});
}

// An output that nobody asked for is empty.
inline Tensor gradient_like(const Tensor& tensor, bool wanted) {
  return wanted ? empty_like(tensor, tensor.sizes()) : empty_like(tensor, {0});
}

inline float* gradient_or_null(Tensor& gradient, bool wanted) {
  return wanted ? gradient.mutable_data_ptr<float>() : nullptr;
}

}  // namespace rlk
