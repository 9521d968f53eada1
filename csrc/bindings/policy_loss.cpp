#include "cpu/policy_loss.h"

#include "bindings.h"

namespace rlk {
namespace {

std::tuple<Tensor, Tensor, Tensor, Tensor> policy_loss_forward(
    Tensor logprobs, std::optional<Tensor> old_logprobs, Tensor advantages, std::optional<Tensor> mask,
    std::optional<Tensor> cu_seqlens, std::optional<Tensor> ref_logprobs, std::optional<Tensor> normalizer,
    double normalizer_value, int64_t objective, int64_t aggregation, double clip_low, double clip_high,
    double dual_clip, double log_ratio_clamp, double kl_coef, int64_t kl_estimator, bool kl_straight_through) {
  PolicyLoss problem = {};
  problem.logprobs = floats(logprobs);
  problem.old_logprobs = data_or_null<float>(old_logprobs);
  problem.ref_logprobs = data_or_null<float>(ref_logprobs);
  problem.mask = data_or_null<bool>(mask);
  problem.advantages = floats(advantages);
  problem.advantage_per_token = advantages.dim() == logprobs.dim() && advantages.numel() == logprobs.numel();
  problem.sequences = sequences_of(logprobs, cu_seqlens);
  problem.mean_over_sequence = aggregation == kSeqMeanTokenMean;
  problem.options =
      make_policy_options(static_cast<int>(objective), ref_logprobs.has_value(), clip_low, clip_high, dual_clip,
                          log_ratio_clamp, kl_coef, static_cast<int>(kl_estimator), kl_straight_through);

  Tensor loss = empty_floats({}), metrics = empty_floats({kPolicyMetrics}), scale = empty_floats({});
  Tensor gradient = empty_floats(logprobs.sizes());
  std::vector<int64_t> lengths(problem.sequences.count);
  std::vector<PolicySums> sums(problem.blocks());
  with_kernels<PolicyLossKernels>([&](auto kernels) {
    parallel(problem.sequences.count, problem.sequences.tokens / std::max<int64_t>(1, problem.sequences.count),
             [&](int64_t begin, int64_t end) { kernels.policy_loss_lengths(problem, lengths.data(), begin, end); });
    parallel(problem.blocks(), PolicyLoss::kBlock, [&](int64_t begin, int64_t end) {
      kernels.policy_loss_sums(problem, lengths.data(), sums.data(), gradient.mutable_data_ptr<float>(), begin, end);
    });
  });

  int64_t num_tokens = 0, num_sequences = 0;
  for (const int64_t length : lengths) {
    num_tokens += length;
    num_sequences += length > 0;
  }
  PolicySums total = {};
  for (const PolicySums& block : sums) {
    total.loss += block.loss;
    for (int k = 0; k < kNumTokens; ++k) total.metrics[k] += block.metrics[k];
  }
  double denominator = 1.0;
  if (normalizer)
    denominator = *floats(*normalizer);
  else if (normalizer_value > 0)
    denominator = normalizer_value;
  else if (aggregation == kTokenMean)
    denominator = static_cast<double>(num_tokens);
  else if (aggregation != kTokenSum)
    denominator = static_cast<double>(num_sequences);

  const bool scored = num_tokens > 0;
  *loss.mutable_data_ptr<float>() = scored ? static_cast<float>(total.loss / denominator) : 0.0f;
  *scale.mutable_data_ptr<float>() = scored ? static_cast<float>(1.0 / denominator) : 0.0f;
  float* const metric = metrics.mutable_data_ptr<float>();
  for (int k = 0; k < kNumTokens; ++k)
    metric[k] = scored ? static_cast<float>(total.metrics[k] / static_cast<double>(num_tokens)) : 0.0f;
  metric[kNumTokens] = static_cast<float>(num_tokens);
  return {loss, metrics, gradient, scale};
}

}  // namespace
}  // namespace rlk

STABLE_TORCH_LIBRARY_IMPL(rlkernels, CPU, m) {
  m.impl("policy_loss_forward.cpu", TORCH_BOX(&rlk::policy_loss_forward));
}
