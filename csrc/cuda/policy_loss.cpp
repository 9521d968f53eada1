#include "policy_loss.h"

#include "tensors.h"

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

  Tensor loss = empty_like(logprobs, {}), metrics = empty_like(logprobs, {kPolicyMetrics});
  Tensor grad = gradient_like(logprobs, need_grad), entropy_grad = gradient_like(logprobs, need_entropy_grad);
  Tensor scale = empty_like(logprobs, {});
  TensorLauncher launch(logprobs);
  launch_policy_loss(
      launch, batch, options, denominator_of(normalizer, normalizer_value, aggregation),
      {loss.mutable_data_ptr<float>(), metrics.mutable_data_ptr<float>(), scale.mutable_data_ptr<float>(),
       gradient_or_null(grad, need_grad), gradient_or_null(entropy_grad, need_entropy_grad)});
  return {loss, metrics, grad, entropy_grad, scale};
}

}  // namespace
}  // namespace rlk

STABLE_TORCH_LIBRARY_IMPL(rlkernels, RLK_CUDA_KEY, m) {
  m.impl("policy_loss_forward.cuda", TORCH_BOX(&rlk::policy_loss_forward));
}
