// What the kernels of the losses over tokens share: sums over blocks of tokens, which one block then adds up.
#pragma once

#include "block.cuh"
#include "rlkernels/aggregation.h"
#include "rlkernels/sequences.h"

namespace rlk {

constexpr int kTokenThreads = 256;
// Few enough for float sums to keep their digits, many enough for the reduction not to count.
constexpr int kBlockTokens = 4 * kTokenThreads;
constexpr int kSequenceThreads = 128;
constexpr int kFinishThreads = kWarp * kMaxWarps;

__device__ inline bool is_scored(const bool* mask, int64_t token) { return mask == nullptr || mask[token]; }

// By one thread: divides the sum of the losses, 0 where nothing is scored. The scale is what the gradients are yet to
// be multiplied by.
__device__ inline void divide_loss(double sum, double tokens, double sequences, const Denominator& denominator,
                                   float* loss, float* scale) {
  const double divisor = denominator(tokens, sequences);
  *loss = tokens > 0.0 ? static_cast<float>(sum / divisor) : 0.0f;
  *scale = tokens > 0.0 ? static_cast<float>(1.0 / divisor) : 0.0f;
}

}  // namespace rlk
