#include "policy_loss.h"

#include "tensors.h"
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
  PolicyBatch batch = {};
  batch.logprobs = floats_of(logprobs);
  batch.old_logprobs = floats_of(old_logprobs);
  batch.ref_logprobs = floats_of(ref_logprobs);
  batch.sampler_logprobs = floats_of(sampler_logprobs);
  batch.entropy = floats_of(entropy);
  batch.mask = flags_of(mask);
  batch.advantages = floats_of(advantages);
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
      launch, batch, options, denominator_of(normalizer, normalizer_value, aggregation), floats_of(normalizer),
      {loss.mutable_data_ptr<float>(), metrics.mutable_data_ptr<float>(), scale.mutable_data_ptr<float>(),
       gradient_or_null(grad, need_grad), gradient_or_null(entropy_grad, need_entropy_grad)});
  return {loss, metrics, grad, entropy_grad, scale};
}

Tensor scaled_like(const Tensor& grad, int64_t dtype) {
  static constexpr ScalarType kTypes[] = {ScalarType::Float, ScalarType::BFloat16, ScalarType::Half,
                                          ScalarType::Double};
  return empty_like(grad, grad.sizes(), kTypes[dtype]);
}

// An empty gradient stays empty. Dtypes are numbered as `Dtype` is.
std::tuple<Tensor, Tensor> token_loss_backward(Tensor grad, Tensor entropy_grad, Tensor scale, Tensor grad_loss,
                                               int64_t dtype, int64_t entropy_dtype) {
  Tensor by_logprobs = scaled_like(grad, dtype), by_entropy = scaled_like(entropy_grad, entropy_dtype);
  const ScaledGradient gradients[] = {
      {floats(grad), {by_logprobs.mutable_data_ptr(), static_cast<Dtype>(dtype)}, grad.numel()},
      {floats(entropy_grad), {by_entropy.mutable_data_ptr(), static_cast<Dtype>(entropy_dtype)}, entropy_grad.numel()}};
  TensorLauncher launch(grad);
  launch_token_loss_backward(launch, gradients[0], gradients[1], floats(scale), floats(grad_loss));
  return {by_logprobs, by_entropy};
}

}  // namespace
}  // namespace rlk

STABLE_TORCH_LIBRARY_IMPL(rlkernels, RLK_CUDA_KEY, m) {
  m.impl("policy_loss_forward.cuda", TORCH_BOX(&rlk::policy_loss_forward));
  m.impl("token_loss_backward.cuda", TORCH_BOX(&rlk::token_loss_backward));
}
