// value_loss: partial sums over blocks of tokens, then one block that adds them up.
#pragma once

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
// (kLengths) each token counts by one over the length of its sequence.
template <bool kPlain, bool kLengths>
__global__ void __launch_bounds__(kTokenThreads)
    value_loss_kernel(ValueBatch batch, float clip, const int* lengths, float* gradient, ValueSums* block_sums) {
  const int64_t tokens = batch.sequences.tokens;
  const int first = threadIdx.x * kRun;
  const bool has_old = batch.old_values.data != nullptr;
  ValueSums sums = {};
  for (int64_t start = int64_t{blockIdx.x} * kTile; start < tokens; start += int64_t{gridDim.x} * kTile) {
    const Range range = {start, 0, tokens - start < kTile ? static_cast<int>(tokens - start) : kTile};
    const FlagRun scored = load_run<kPlain>(batch.mask, range, first);
    float value[kRun], target[kRun], old[kRun] = {};
    load_run<kPlain>(batch.values, range, first, value);
    load_run<kPlain>(batch.returns, range, first, target);
    if (has_old) load_run<kPlain>(batch.old_values, range, first, old);
    int64_t sequence[kRun] = {};
    if (kLengths && lengths != nullptr) sequences_of_run(batch.sequences, start + first, sequence);
    float by_value[kRun];
#pragma unroll
    for (int i = 0; i < kRun; ++i) {
      // What is not scored may be anything.
      if (!scored[i]) value[i] = target[i] = old[i] = 0.0f;
      const TokenValueLoss<float> t = value_token_loss(value[i], old[i], target[i], has_old, clip);
      float length = 1.0f;
      if (kLengths && lengths != nullptr && scored[i])
        length = sequence[i] < batch.sequences.count ? static_cast<float>(lengths[sequence[i]]) : kNan;
      by_value[i] = kLengths ? t.derivative / length : t.derivative;
      const double wide_target = target[i], error = t.error;
      sums.add({kLengths ? t.loss / length : t.loss, scored[i] ? t.clipped : 0.0f, value[i], wide_target,
                wide_target * wide_target, error, error * error, scored[i] ? 1.0 : 0.0});
    }
    if (gradient != nullptr) {
#pragma unroll
      for (int i = 0; i < kRun; ++i)
        if (!scored[i]) by_value[i] = 0.0f;
      store_run<kPlain>(gradient, range, first, by_value);
    }
  }
  sums = block_reduce(sums, [](const ValueSums& a, const ValueSums& b) { return add(a, b); });
  if (threadIdx.x == 0) block_sums[blockIdx.x] = sums;
}

// One block, a thread for each partial sum. lengths may be null where the denominator does not count sequences.
__global__ void __launch_bounds__(kFinishThreads)
    value_loss_finish_kernel(const ValueSums* block_sums, int64_t blocks, const int* lengths, int64_t sequences,
                             LossEnd end, float* metrics) {
  ValueSums totals = {};
  int scored_sequences = 0;
  if (threadIdx.x < blocks) totals = block_sums[threadIdx.x];
  if (lengths != nullptr)
    for (int64_t s = threadIdx.x; s < sequences; s += blockDim.x) scored_sequences += lengths[s] > 0;
  totals = block_reduce(totals, [](const ValueSums& a, const ValueSums& b) { return add(a, b); });
  scored_sequences = block_reduce(scored_sequences, [](int a, int b) { return a + b; });
  if (threadIdx.x != 0) return;
  end.divide(totals.loss, totals.tokens, scored_sequences);
  value_metrics(totals, metrics);
}

}  // namespace rlk
