#include "cpu/policy_loss.h"

#include "token_losses.h"

namespace rlk {
namespace {

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> policy_loss_forward(
    Tensor logprobs, std::optional<Tensor> old_logprobs, Tensor advantages, std::optional<Tensor> mask,
    std::optional<Tensor> cu_seqlens, std::optional<Tensor> ref_logprobs, std::optional<Tensor> sampler_logprobs,
    std::optional<Tensor> entropy, std::optional<Tensor> normalizer, double normalizer_value, int64_t aggregation,
    int64_t objective, double clip_low, double clip_high, double dual_clip, double delta, double log_ratio_clamp,
    double k_pos, double k_neg, double rate_pos, double rate_neg, double kl_coef, int64_t kl_estimator,
    bool kl_straight_through, double entropy_coef, int64_t sampler_correction, double sampler_cap, bool need_grad,
    bool need_entropy_grad) {
  PolicyLoss problem = {};
  problem.logprobs = floats(logprobs);
  problem.old_logprobs = data_or_null<float>(old_logprobs);
  problem.ref_logprobs = data_or_null<float>(ref_logprobs);
  problem.sampler_logprobs = data_or_null<float>(sampler_logprobs);
  problem.entropy = data_or_null<float>(entropy);
  problem.mask = data_or_null<bool>(mask);
  problem.advantages = floats(advantages);
  problem.advantage_per_token = advantages.dim() == logprobs.dim() && advantages.numel() == logprobs.numel();
  problem.sequences = sequences_of(logprobs, cu_seqlens);
  problem.mean_over_sequence = aggregation == kSeqMeanTokenMean;
  problem.options =
      make_policy_options(static_cast<int>(objective), clip_low, clip_high, dual_clip, delta, log_ratio_clamp, k_pos,
                          k_neg, rate_pos, rate_neg, kl_coef, static_cast<int>(kl_estimator), kl_straight_through,
                          entropy_coef, static_cast<int>(sampler_correction), sampler_cap);
  problem.options.has_ref = ref_logprobs.has_value();
  problem.options.has_sampler = sampler_logprobs.has_value();
  problem.options.has_entropy = entropy.has_value();
  const Denominator denominator = denominator_of(normalizer, normalizer_value, aggregation);

  Tensor loss = empty_floats({}), metrics = empty_floats({kPolicyMetrics}), scale = empty_floats({});
  Tensor grad = gradient_like(logprobs, need_grad), entropy_grad = gradient_like(logprobs, need_entropy_grad);
  float* const grad_data = gradient_or_null(grad, need_grad);
  float* const entropy_grad_data = gradient_or_null(entropy_grad, need_entropy_grad);
  const int64_t tokens = problem.sequences.tokens, count = problem.sequences.count;
  std::vector<SequenceFactors> factors(problem.options.needs_sequences() || denominator.needs_lengths() ? count : 0);
  std::vector<PolicySums> sums(loss_blocks(tokens));
  with_kernels<PolicyLossKernels>([&](auto kernels) {
    parallel(factors.size(), tokens / std::max<int64_t>(1, count),
             [&](int64_t begin, int64_t end) { kernels.policy_loss_sequences(problem, factors.data(), begin, end); });
    parallel(sums.size(), kLossBlock, [&](int64_t begin, int64_t end) {
      kernels.policy_loss_sums(problem, factors.empty() ? nullptr : factors.data(), sums.data(), grad_data,
                               entropy_grad_data, begin, end);
    });
  });

  int64_t num_sequences = 0;
  for (const SequenceFactors& sequence : factors) num_sequences += sequence.length > 0.0f;
  PolicySums total = {};
  for (const PolicySums& block : sums) {
    total.loss += block.loss;
    total.tokens += block.tokens;
    for (int k = 0; k < kPolicyMeans; ++k) total.means[k] += block.means[k];
  }
  const bool scored = total.tokens > 0.0;
  divide_loss(total.loss, denominator(total.tokens, static_cast<double>(num_sequences)), scored, loss, scale);
  float* const metric = metrics.mutable_data_ptr<float>();
  for (int k = 0; k < kPolicyMeans; ++k) metric[k] = scored ? static_cast<float>(total.means[k] / total.tokens) : 0.0f;
  metric[kNumTokens] = static_cast<float>(total.tokens);
  return {loss, metrics, grad, entropy_grad, scale};
}

}  // namespace
}  // namespace rlk

STABLE_TORCH_LIBRARY_IMPL(rlkernels, CPU, m) {
  m.impl("policy_loss_forward.cpu", TORCH_BOX(&rlk::policy_loss_forward));
}
