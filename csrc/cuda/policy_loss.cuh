// policy_loss: where the objective or the sampler's weights take numbers of a whole sequence, these first; then partial
// sums over blocks of tokens, and one block that adds them up.
#pragma once

#include "policy_loss.h"
#include "token_losses.cuh"
#include "token_losses.h"

namespace rlk {

// Over the scored tokens of a sequence.
struct SequenceSums {
  double length, log_ratio, log_weight, advantage;
};

// Block s: what each token of sequence s takes of the whole of it.
__global__ void policy_sequences_kernel(PolicyBatch batch, PolicyOptions options, SequenceFactors* factors) {
  const int64_t s = blockIdx.x, begin = batch.sequences.start(s), end = batch.sequences.start(s + 1);
  SequenceSums sums = {};
  for (int64_t token = begin + threadIdx.x; token < end; token += blockDim.x) {
    if (!is_scored(batch.mask, token)) continue;
    sums.length += 1.0;
    if (!options.needs_sequences()) continue;
    TokenInputs<float> x = {};
    x.old_logprob = element<false>(batch.old_logprobs.data != nullptr ? batch.old_logprobs : batch.logprobs, token);
    if (options.sequence_objective()) x.logprob = element<false>(batch.logprobs, token);
    if (options.has_sampler) x.sampler_logprob = element<false>(batch.sampler_logprobs, token);
    if (options.objective == kGmpo)
      x.advantage = element<false>(batch.advantages, batch.advantage_per_token ? token : s);
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
// wanted. `factors` is null where nothing is taken of a sequence. What few losses have is left out of the others'
// kernels: without kExtras none of the options' has_* is set, there are no factors, and all sequences have one length.
template <int kObjective, bool kPlain, bool kExtras>
__global__ void __launch_bounds__(kTokenThreads)
    policy_loss_kernel(PolicyBatch batch, PolicyOptions options, const SequenceFactors* factors,
                       bool mean_over_sequence, float* gradient, float* entropy_gradient, PolicySums* block_sums) {
  if constexpr (!kExtras) {
    options.has_ref = options.has_sampler = options.has_entropy = false;
    options.has_dual_clip = options.has_delta = options.has_log_ratio_clamp = false;
  }
  mean_over_sequence = kExtras && mean_over_sequence;
  const int64_t tokens = batch.sequences.tokens;
  const int first = threadIdx.x * kRun;
  PolicySums sums = {};
  for (int64_t start = int64_t{blockIdx.x} * kTile; start < tokens; start += int64_t{gridDim.x} * kTile) {
    const Range range = {start, 0, tokens - start < kTile ? static_cast<int>(tokens - start) : kTile};
    // All are read before anything is asked of them. What is not scored may be anything, and is not selected.
    const FlagRun scored = load_run<kPlain>(batch.mask, range, first);
    float logprob[kRun], old_logprob[kRun], advantage[kRun], ref[kRun] = {}, sampler[kRun] = {}, entropy[kRun] = {};
    load_run<kPlain>(batch.logprobs, range, first, logprob);
    if (batch.old_logprobs.data != nullptr)
      load_run<kPlain>(batch.old_logprobs, range, first, old_logprob);
    else
      memcpy(old_logprob, logprob, sizeof logprob);
    if (kExtras && options.has_ref) load_run<kPlain>(batch.ref_logprobs, range, first, ref);
    if (kExtras && options.has_sampler) load_run<kPlain>(batch.sampler_logprobs, range, first, sampler);
    if (kExtras && options.has_entropy) load_run<kPlain>(batch.entropy, range, first, entropy);
    if (batch.advantage_per_token) load_run<kPlain>(batch.advantages, range, first, advantage);
    int64_t sequence[kRun] = {};
    if constexpr (!kExtras) {
      unsigned row[kRun] = {};
      if (!batch.advantage_per_token && first < range.end)
        rows_of_run(batch.sequences, static_cast<unsigned>(start) + first, row);
#pragma unroll
      for (int i = 0; i < kRun; ++i) {
        if (!batch.advantage_per_token) advantage[i] = element<kPlain>(batch.advantages, row[i]);
      }
    } else if (!batch.advantage_per_token || factors != nullptr)
      sequences_of_run(batch.sequences, start + first, sequence);

    float by_logprob[kRun], by_entropy[kRun];
#pragma unroll
    for (int i = 0; i < kRun; ++i) {
      // Where cu_seqlens is wrong, a token may lie in no sequence.
      const bool known = sequence[i] < batch.sequences.count;
      if (kExtras && !batch.advantage_per_token)
        advantage[i] = known && scored[i] ? element<kPlain>(batch.advantages, sequence[i]) : kNan;
      SequenceFactors whole = {kNan, kNan, kNan, kNan, kNan, kNan, kNan};
      if (kExtras && factors != nullptr && known) whole = factors[sequence[i]];
      TokenInputs<float> x = {};
      x.logprob = logprob[i], x.old_logprob = old_logprob[i], x.advantage = advantage[i];
      x.ref_logprob = ref[i], x.sampler_logprob = sampler[i], x.entropy = entropy[i];
      const TokenLoss<float> t = policy_token_loss<kObjective>(options, x, whole);
      // A share of 1 is not divided by: that is exact, and no instruction.
      const float share = mean_over_sequence ? 1.0f / whole.length : 1.0f;
      by_logprob[i] = scored[i] ? mean_over_sequence ? t.derivative / whole.length : t.derivative : 0.0f;
      by_entropy[i] = scored[i] ? -options.entropy_coef * share : 0.0f;
      const auto add = [&](float& sum, float value) { sum += scored[i] ? value : 0.0f; };
      add(sums.loss, mean_over_sequence ? t.loss / whole.length : t.loss);
      add(sums.means[kRatioMean], t.ratio);
      add(sums.means[kClipLow], t.clipped_low);
      add(sums.means[kClipHigh], t.clipped_high);
      add(sums.means[kApproxKl], t.approx_kl);
      add(sums.tokens, 1.0f);
      if constexpr (kExtras) {
        add(sums.means[kRefKl], t.ref_kl);
        add(sums.means[kEntropy], x.entropy);
        add(sums.means[kSamplerWeight], t.weight);
        add(sums.means[kSamplerCapped], t.capped);
      }
    }
    if (gradient != nullptr) store_run<kPlain>(gradient, range, first, by_logprob);
    if (kExtras && entropy_gradient != nullptr) store_run<kPlain>(entropy_gradient, range, first, by_entropy);
  }
  if constexpr (!kExtras) sums.means[kSamplerWeight] = sums.tokens;
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

// One block, a thread for each partial sum. `factors` may be null where the denominator does not count sequences.
__global__ void __launch_bounds__(kFinishThreads)
    policy_loss_finish_kernel(const PolicySums* block_sums, int64_t blocks, const SequenceFactors* factors,
                              int64_t sequences, LossEnd end, float* metrics) {
  PolicyTotals totals = {};
  if (threadIdx.x < blocks) {
    const PolicySums sums = block_sums[threadIdx.x];
    totals.loss = sums.loss;
    for (int k = 0; k < kPolicyMeans; ++k) totals.means[k] = sums.means[k];
    totals.tokens = sums.tokens;
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
  end.divide(totals.loss, totals.tokens, totals.sequences);
  for (int k = 0; k < kPolicyMeans; ++k) metrics[k] = any ? static_cast<float>(totals.means[k] / totals.tokens) : 0.0f;
  metrics[kNumTokens] = static_cast<float>(totals.tokens);
}

// A thread per run of a gradient, which starts at a multiple of 16 bytes as memory of its own does: the first blocks
// are for the one, the others for the other.
__global__ void __launch_bounds__(kTokenThreads)
    token_loss_backward_kernel(ScaledGradient by_logprobs, ScaledGradient by_entropy, int64_t first_blocks,
                               const float* scale, const float* grad_loss) {
  const bool is_first = blockIdx.x < first_blocks;
  const float* const gradient = is_first ? by_logprobs.gradient : by_entropy.gradient;
  const FloatsOut result = {is_first ? by_logprobs.result.data : by_entropy.result.data,
                            is_first ? by_logprobs.result.dtype : by_entropy.result.dtype};
  const int64_t count = is_first ? by_logprobs.count : by_entropy.count;
  const int64_t block = is_first ? blockIdx.x : blockIdx.x - first_blocks;
  const int64_t first = (block * kTokenThreads + threadIdx.x) * kRun;
  const bool whole = first + kRun <= count;
  const float factor = *scale * *grad_loss;
  float values[kRun] = {};
  if (whole) {
    const float4 four = *reinterpret_cast<const float4*>(gradient + first);
    values[0] = four.x, values[1] = four.y, values[2] = four.z, values[3] = four.w;
  } else {
    for (int i = 0; i < kRun && first + i < count; ++i) values[i] = gradient[first + i];
  }
#pragma unroll
  for (float& value : values) value *= factor;
  if (whole && result.dtype == Dtype::kFloat)
    __stcg(reinterpret_cast<float4*>(static_cast<float*>(result.data) + first),
           make_float4(values[0], values[1], values[2], values[3]));
  else
    for (int i = 0; i < kRun && first + i < count; ++i) store<false>(result, first + i, values[i]);
}

}  // namespace rlk
