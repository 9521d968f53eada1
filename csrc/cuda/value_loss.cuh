// value_loss: partial sums over blocks of tokens, then one block that adds them up.
#pragma once

#include "rlkernels/value_loss.h"
#include "token_losses.cuh"
#include "value_loss.h"

namespace rlk {

// Block s: the number of scored tokens of sequence s.
__global__ void value_lengths_kernel(ValueBatch batch, int* lengths) {
  const int64_t begin = batch.sequences.start(blockIdx.x), end = batch.sequences.start(blockIdx.x + int64_t{1});
  int count = 0;
  for (int64_t token = begin + threadIdx.x; token < end; token += blockDim.x) count += is_scored(batch.mask, token);
  count = block_reduce(count, [](int a, int b) { return a + b; });
  if (threadIdx.x == 0) lengths[blockIdx.x] = count;
}

__device__ inline ValueSums add(ValueSums a, const ValueSums& b) {
  a.add(b);
  return a;
}

// gradient [tokens] is by values, before the division by the loss's denominator; null where not wanted. With `lengths`
// each token counts by one over the length of its sequence.
__global__ void __launch_bounds__(kTokenThreads)
    value_loss_kernel(ValueBatch batch, float clip, const int* lengths, float* gradient, ValueSums* block_sums) {
  ValueSums sums = {};
  const int64_t first = int64_t{blockIdx.x} * kBlockTokens;
  for (int64_t token = first + threadIdx.x; token < first + kBlockTokens && token < batch.sequences.tokens;
       token += kTokenThreads) {
    if (!is_scored(batch.mask, token)) {
      if (gradient != nullptr) gradient[token] = 0.0f;
      continue;
    }
    float length = 1.0f;
    if (lengths != nullptr) {
      const int64_t s = batch.sequences.of(token);
      length = s < batch.sequences.count ? static_cast<float>(lengths[s]) : kNan;
    }
    const bool has_old = batch.old_values != nullptr;
    const float value = batch.values[token], target = batch.returns[token];
    const TokenValueLoss<float> t =
        value_token_loss(value, has_old ? batch.old_values[token] : value, target, has_old, clip);
    if (gradient != nullptr) gradient[token] = t.derivative / length;
    const double wide_target = target, error = t.error;
    sums.add({t.loss / length, t.clipped, value, wide_target, wide_target * wide_target, error, error * error, 1.0});
  }
  sums = block_reduce(sums, [](const ValueSums& a, const ValueSums& b) { return add(a, b); });
  if (threadIdx.x == 0) block_sums[blockIdx.x] = sums;
}

// One block. lengths may be null where the denominator does not count sequences.
__global__ void value_loss_finish_kernel(const ValueSums* block_sums, int64_t blocks, const int* lengths,
                                         int64_t sequences, Denominator denominator, float* loss, float* metrics,
                                         float* scale) {
  ValueSums totals = {};
  int scored_sequences = 0;
  for (int64_t block = threadIdx.x; block < blocks; block += blockDim.x) totals.add(block_sums[block]);
  if (lengths != nullptr)
    for (int64_t s = threadIdx.x; s < sequences; s += blockDim.x) scored_sequences += lengths[s] > 0;
  totals = block_reduce(totals, [](const ValueSums& a, const ValueSums& b) { return add(a, b); });
  scored_sequences = block_reduce(scored_sequences, [](int a, int b) { return a + b; });
  if (threadIdx.x != 0) return;
  divide_loss(totals.loss, totals.tokens, scored_sequences, denominator, loss, scale);
  value_metrics(totals, metrics);
}

}  // namespace rlk
