// policy_loss: partial sums over blocks of tokens, then one block that adds them up.
#pragma once

#include "block.cuh"
#include "rlkernels/policy_loss.h"
#include "rlkernels/sequences.h"

namespace rlk {

constexpr int kTokenThreads = 256;
// Few enough for float sums to keep their digits, many enough for the reduction not to count.
constexpr int kBlockTokens = 4 * kTokenThreads;

struct PolicyBatch {
  const float* logprobs;      // [tokens], as are old_logprobs, ref_logprobs and mask
  const float* old_logprobs;  // or null: logprobs
  const float* ref_logprobs;  // or null
  const bool* mask;           // or null: every token is scored
  const float* advantages;    // [tokens] or [sequences]
  bool advantage_per_token;
  Sequences sequences;

  __device__ bool scored(int64_t token) const { return mask == nullptr || mask[token]; }
};

// Over some scored tokens: their loss, what the metrics average, and their number.
struct PolicySums {
  float loss, metrics[kNumTokens], tokens;
};

// Block s: the number of scored tokens of sequence s.
__global__ void sequence_lengths_kernel(PolicyBatch batch, int* lengths) {
  const int64_t begin = batch.sequences.start(blockIdx.x), end = batch.sequences.start(blockIdx.x + int64_t{1});
  int count = 0;
  for (int64_t token = begin + threadIdx.x; token < end; token += blockDim.x) count += batch.scored(token);
  count = block_reduce(count, [](int a, int b) { return a + b; });
  if (threadIdx.x == 0) lengths[blockIdx.x] = count;
}

// gradient [tokens] is by logprobs, before the division by the loss's denominator. With `lengths` each token counts by
// one over the length of its sequence.
__global__ void __launch_bounds__(kTokenThreads)
    policy_loss_kernel(PolicyBatch batch, PolicyOptions options, const int* lengths, float* gradient,
                       PolicySums* block_sums) {
  PolicySums sums = {};
  const int64_t first = int64_t{blockIdx.x} * kBlockTokens;
  for (int64_t token = first + threadIdx.x; token < first + kBlockTokens && token < batch.sequences.tokens;
       token += kTokenThreads) {
    if (!batch.scored(token)) {
      gradient[token] = 0.0f;
      continue;
    }
    float advantage = kNan, length = lengths != nullptr ? kNan : 1.0f;
    if (batch.advantage_per_token) advantage = batch.advantages[token];
    if (!batch.advantage_per_token || lengths != nullptr) {
      const int64_t s = batch.sequences.of(token);
      if (s < batch.sequences.count) {
        if (!batch.advantage_per_token) advantage = batch.advantages[s];
        if (lengths != nullptr) length = static_cast<float>(lengths[s]);
      }
    }
    const float logprob = batch.logprobs[token];
    const TokenLoss<float> t =
        policy_token_loss(options, logprob, batch.old_logprobs != nullptr ? batch.old_logprobs[token] : logprob,
                          batch.ref_logprobs != nullptr ? batch.ref_logprobs[token] : 0.0f, advantage);
    gradient[token] = t.derivative / length;
    sums.loss += t.loss / length;
    sums.metrics[kRatioMean] += t.ratio;
    sums.metrics[kClipLow] += t.clipped_low;
    sums.metrics[kClipHigh] += t.clipped_high;
    sums.metrics[kApproxKl] += t.approx_kl;
    sums.metrics[kRefKl] += t.ref_kl;
    sums.tokens += 1.0f;
  }
  sums = block_reduce(sums, [](const PolicySums& a, const PolicySums& b) {
    PolicySums sum = {a.loss + b.loss, {}, a.tokens + b.tokens};
    for (int k = 0; k < kNumTokens; ++k) sum.metrics[k] = a.metrics[k] + b.metrics[k];
    return sum;
  });
  if (threadIdx.x == 0) block_sums[blockIdx.x] = sums;
}

struct PolicyTotals {
  double loss, metrics[kNumTokens], tokens, sequences;
};

// What divides the sum of losses: *normalizer or normalizer_value where given (not null, not 0), else a count.
struct Denominator {
  const float* normalizer;
  float normalizer_value;
  int aggregation;

  __device__ double operator()(const PolicyTotals& totals) const {
    if (normalizer != nullptr) return *normalizer;
    if (normalizer_value > 0.0f) return normalizer_value;
    if (aggregation == kTokenMean) return totals.tokens;
    return aggregation == kTokenSum ? 1.0 : totals.sequences;
  }
};

// One block. lengths may be null where the denominator does not count sequences.
__global__ void policy_loss_finish_kernel(const PolicySums* block_sums, int64_t blocks, const int* lengths,
                                          int64_t sequences, Denominator denominator, float* loss, float* metrics,
                                          float* scale) {
  PolicyTotals totals = {};
  for (int64_t block = threadIdx.x; block < blocks; block += blockDim.x) {
    const PolicySums& sums = block_sums[block];
    totals.loss += sums.loss;
    for (int k = 0; k < kNumTokens; ++k) totals.metrics[k] += sums.metrics[k];
    totals.tokens += sums.tokens;
  }
  if (lengths != nullptr)
    for (int64_t s = threadIdx.x; s < sequences; s += blockDim.x) totals.sequences += lengths[s] > 0;
  totals = block_reduce(totals, [](const PolicyTotals& a, const PolicyTotals& b) {
    PolicyTotals sum = {a.loss + b.loss, {}, a.tokens + b.tokens, a.sequences + b.sequences};
    for (int k = 0; k < kNumTokens; ++k) sum.metrics[k] = a.metrics[k] + b.metrics[k];
    return sum;
  });
  if (threadIdx.x != 0) return;
  const bool any = totals.tokens > 0.0;
  const double divisor = denominator(totals);
  *loss = any ? static_cast<float>(totals.loss / divisor) : 0.0f;
  *scale = any ? static_cast<float>(1.0 / divisor) : 0.0f;
  for (int k = 0; k < kNumTokens; ++k) metrics[k] = any ? static_cast<float>(totals.metrics[k] / totals.tokens) : 0.0f;
  metrics[kNumTokens] = static_cast<float>(totals.tokens);
}

}  // namespace rlk
