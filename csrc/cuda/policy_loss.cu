#include <array>
#include <utility>

#include "policy_loss.cuh"
#include "token_losses.h"

namespace rlk {
namespace {

template <size_t... kObjective>
constexpr auto kernels_of(std::index_sequence<kObjective...>) {
  return std::array{policy_loss_kernel<static_cast<int>(kObjective)>...};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> policy_loss_forward(
    Tensor logprobs, std::optional<Tensor> old_logprobs, Tensor advantages, std::optional<Tensor> mask,
    std::optional<Tensor> cu_seqlens, std::optional<Tensor> ref_logprobs, std::optional<Tensor> sampler_logprobs,
    std::optional<Tensor> entropy, std::optional<Tensor> normalizer, double normalizer_value, int64_t aggregation,
    int64_t objective, double clip_low, double clip_high, double dual_clip, double delta, double log_ratio_clamp,
    double k_pos, double k_neg, double rate_pos, double rate_neg, double kl_coef, int64_t kl_estimator,
    bool kl_straight_through, double entropy_coef, int64_t sampler_correction, double sampler_cap, bool need_grad,
    bool need_entropy_grad) {
  const Launcher launch(logprobs);
  PolicyBatch batch = {};
  batch.logprobs = floats(logprobs);
  batch.old_logprobs = data_or_null<float>(old_logprobs);
  batch.ref_logprobs = data_or_null<float>(ref_logprobs);
  batch.sampler_logprobs = data_or_null<float>(sampler_logprobs);
  batch.entropy = data_or_null<float>(entropy);
  batch.mask = data_or_null<bool>(mask);
  batch.advantages = floats(advantages);
  batch.advantage_per_token = advantages.dim() == logprobs.dim() && advantages.numel() == logprobs.numel();
  batch.sequences = sequences_of(logprobs, cu_seqlens);
  PolicyOptions options =
      make_policy_options(static_cast<int>(objective), clip_low, clip_high, dual_clip, delta, log_ratio_clamp, k_pos,
                          k_neg, rate_pos, rate_neg, kl_coef, static_cast<int>(kl_estimator), kl_straight_through,
                          entropy_coef, static_cast<int>(sampler_correction), sampler_cap);
  options.has_ref = ref_logprobs.has_value();
  options.has_sampler = sampler_logprobs.has_value();
  options.has_entropy = entropy.has_value();
  const Denominator denominator = denominator_of(normalizer, normalizer_value, aggregation);

  Tensor loss = empty_like(logprobs, {}), metrics = empty_like(logprobs, {kPolicyMetrics});
  Tensor grad = gradient_like(logprobs, need_grad), entropy_grad = gradient_like(logprobs, need_entropy_grad);
  Tensor scale = empty_like(logprobs, {});
  const int64_t blocks = divide_up(batch.sequences.tokens, kBlockTokens), count = batch.sequences.count;
  Tensor block_sums = empty_for<PolicySums>(logprobs, blocks);
  PolicySums* const sums = static_cast<PolicySums*>(block_sums.data_ptr());

  std::optional<Tensor> sequence_factors;
  SequenceFactors* factors = nullptr;
  if (options.needs_sequences() || denominator.needs_lengths()) {
    sequence_factors = empty_for<SequenceFactors>(logprobs, count);
    factors = static_cast<SequenceFactors*>(sequence_factors->data_ptr());
    launch(policy_sequences_kernel, count, kSequenceThreads, batch, options, factors);
  }
  const bool mean_over_sequence = aggregation == kSeqMeanTokenMean;
  const SequenceFactors* const used = options.needs_sequences() || mean_over_sequence ? factors : nullptr;
  static constexpr auto kKernels = kernels_of(std::make_index_sequence<kObjectives>());
  launch(kKernels[objective], blocks, kTokenThreads, batch, options, used, mean_over_sequence,
         gradient_or_null(grad, need_grad), gradient_or_null(entropy_grad, need_entropy_grad), sums);
  launch(policy_loss_finish_kernel, 1, kFinishThreads, sums, blocks, factors, count, denominator,
         loss.mutable_data_ptr<float>(), metrics.mutable_data_ptr<float>(), scale.mutable_data_ptr<float>());
  return {loss, metrics, grad, entropy_grad, scale};
}

}  // namespace
}  // namespace rlk

STABLE_TORCH_LIBRARY_IMPL(rlkernels, RLK_CUDA_KEY, m) {
  m.impl("policy_loss_forward.cuda", TORCH_BOX(&rlk::policy_loss_forward));
}
