// policy_loss: where the objective or the sampler's weights take numbers of a whole sequence, these first; then partial
// sums over blocks of tokens, and one block that adds them up.
#pragma once

#include "policy_loss.h"
#include "token_losses.cuh"

namespace rlk {

// Over the scored tokens of a sequence.
struct SequenceSums {
  double length, log_ratio, log_weight, advantage;
};

// Block s: what each token of sequence s takes of the whole of it.
__global__ void policy_sequences_kernel(PolicyBatch batch, PolicyOptions options, SequenceFactors* factors) {
  const int64_t s = blockIdx.x, begin = batch.sequences.start(s), end = batch.sequences.start(s + 1);
  const float advantage = batch.advantage_per_token ? kNan : batch.advantages[s];
  SequenceSums sums = {};
  for (int64_t token = begin + threadIdx.x; token < end; token += blockDim.x) {
    if (!is_scored(batch.mask, token)) continue;
    sums.length += 1.0;
    if (!options.needs_sequences()) continue;
    TokenInputs<float> x = {};
    x.old_logprob = batch.old_logprob(token);
    if (options.sequence_objective()) x.logprob = batch.logprobs[token];
    if (options.has_sampler) x.sampler_logprob = batch.sampler_logprobs[token];
    if (options.objective == kGmpo) x.advantage = batch.advantage_per_token ? batch.advantages[token] : advantage;
    const SequenceTerms<float> terms = policy_sequence_terms(options, x);
    sums.log_ratio += terms.log_ratio;
    sums.log_weight += terms.log_weight;
    sums.advantage += x.advantage;
  }
  sums = block_reduce(sums, [](const SequenceSums& a, const SequenceSums& b) {
    return SequenceSums{a.length + b.length, a.log_ratio + b.log_ratio, a.log_weight + b.log_weight,
                        a.advantage + b.advantage};
  });
  if (threadIdx.x == 0)
    factors[s] = policy_sequence_factors(options, sums.length, sums.log_ratio, sums.log_weight, sums.advantage);
}

// Over some scored tokens: their loss, what the metrics average, and their number.
struct PolicySums {
  float loss, means[kPolicyMeans], tokens;
};

// The gradients [tokens] are by logprobs and by entropy, before the division by the loss's denominator; null where not
// wanted. `factors` is null where nothing is taken of a sequence.
template <int kObjective>
__global__ void __launch_bounds__(kTokenThreads)
    policy_loss_kernel(PolicyBatch batch, PolicyOptions options, const SequenceFactors* factors,
                       bool mean_over_sequence, float* gradient, float* entropy_gradient, PolicySums* block_sums) {
  PolicySums sums = {};
  const int64_t first = int64_t{blockIdx.x} * kBlockTokens;
  for (int64_t token = first + threadIdx.x; token < first + kBlockTokens && token < batch.sequences.tokens;
       token += kTokenThreads) {
    if (!is_scored(batch.mask, token)) {
      if (gradient != nullptr) gradient[token] = 0.0f;
      if (entropy_gradient != nullptr) entropy_gradient[token] = 0.0f;
      continue;
    }
    TokenInputs<float> x = {};
    // Where cu_seqlens is wrong, a token may lie in no sequence.
    SequenceFactors whole = {kNan, kNan, kNan, kNan, kNan, kNan, kNan};
    x.advantage = batch.advantage_per_token ? batch.advantages[token] : kNan;
    if (!batch.advantage_per_token || factors != nullptr) {
      const int64_t s = batch.sequences.of(token);
      if (s < batch.sequences.count) {
        if (!batch.advantage_per_token) x.advantage = batch.advantages[s];
        if (factors != nullptr) whole = factors[s];
      }
    }
    x.logprob = batch.logprobs[token];
    x.old_logprob = batch.old_logprobs != nullptr ? batch.old_logprobs[token] : x.logprob;
    if (batch.sampler_logprobs != nullptr) x.sampler_logprob = batch.sampler_logprobs[token];
    if (batch.ref_logprobs != nullptr) x.ref_logprob = batch.ref_logprobs[token];
    if (batch.entropy != nullptr) x.entropy = batch.entropy[token];
    const TokenLoss<float> t = policy_token_loss<kObjective>(options, x, whole);
    const float length = mean_over_sequence ? whole.length : 1.0f;
    if (gradient != nullptr) gradient[token] = t.derivative / length;
    if (entropy_gradient != nullptr) entropy_gradient[token] = -options.entropy_coef / length;
    sums.loss += t.loss / length;
    sums.means[kRatioMean] += t.ratio;
    sums.means[kClipLow] += t.clipped_low;
    sums.means[kClipHigh] += t.clipped_high;
    sums.means[kApproxKl] += t.approx_kl;
    sums.means[kRefKl] += t.ref_kl;
    sums.means[kEntropy] += x.entropy;
    sums.means[kSamplerWeight] += t.weight;
    sums.means[kSamplerCapped] += t.capped;
    sums.tokens += 1.0f;
  }
  sums = block_reduce(sums, [](const PolicySums& a, const PolicySums& b) {
    PolicySums sum = {a.loss + b.loss, {}, a.tokens + b.tokens};
    for (int k = 0; k < kPolicyMeans; ++k) sum.means[k] = a.means[k] + b.means[k];
    return sum;
  });
  if (threadIdx.x == 0) block_sums[blockIdx.x] = sums;
}

struct PolicyTotals {
  double loss, means[kPolicyMeans], tokens, sequences;
};

// One block. `factors` may be null where the denominator does not count sequences.
__global__ void policy_loss_finish_kernel(const PolicySums* block_sums, int64_t blocks, const SequenceFactors* factors,
                                          int64_t sequences, Denominator denominator, float* loss, float* metrics,
                                          float* scale) {
  PolicyTotals totals = {};
  for (int64_t block = threadIdx.x; block < blocks; block += blockDim.x) {
    const PolicySums& sums = block_sums[block];
    totals.loss += sums.loss;
    for (int k = 0; k < kPolicyMeans; ++k) totals.means[k] += sums.means[k];
    totals.tokens += sums.tokens;
  }
  if (factors != nullptr)
    for (int64_t s = threadIdx.x; s < sequences; s += blockDim.x) totals.sequences += factors[s].length > 0.0f;
  totals = block_reduce(totals, [](const PolicyTotals& a, const PolicyTotals& b) {
    PolicyTotals sum = {a.loss + b.loss, {}, a.tokens + b.tokens, a.sequences + b.sequences};
    for (int k = 0; k < kPolicyMeans; ++k) sum.means[k] = a.means[k] + b.means[k];
    return sum;
  });
  if (threadIdx.x != 0) return;
  const bool any = totals.tokens > 0.0;
  divide_loss(totals.loss, totals.tokens, totals.sequences, denominator, loss, scale);
  for (int k = 0; k < kPolicyMeans; ++k) metrics[k] = any ? static_cast<float>(totals.means[k] / totals.tokens) : 0.0f;
  metrics[kNumTokens] = static_cast<float>(totals.tokens);
}

}  // namespace rlk
