#include "kl.h"

#include "tensors.h"

namespace rlk {
namespace {

KlOptions kl_options(int64_t estimator, bool straight_through, double log_ratio_clamp, double value_clamp) {
  return {static_cast<int>(estimator), straight_through, static_cast<float>(log_ratio_clamp),
          static_cast<float>(value_clamp)};
}

Tensor kl_penalty_forward(Tensor logprobs, Tensor ref_logprobs, int64_t estimator, bool straight_through,
                          double log_ratio_clamp, double value_clamp) {
  Tensor penalty = empty_like(logprobs, logprobs.sizes());
  launch_kl_penalty_forward(TensorLauncher(logprobs), floats_of(logprobs), floats_of(ref_logprobs),
                            penalty.mutable_data_ptr<float>(), logprobs.numel(),
                            kl_options(estimator, straight_through, log_ratio_clamp, value_clamp));
  return penalty;
}

std::tuple<Tensor, Tensor> kl_penalty_backward(Tensor grad, Tensor logprobs, Tensor ref_logprobs, int64_t estimator,
                                               bool straight_through, double log_ratio_clamp, double value_clamp,
                                               bool need_ref) {
  Tensor grad_logprobs = torch::stable::new_empty(logprobs, logprobs.sizes());
  Tensor grad_ref =
      need_ref ? torch::stable::new_empty(ref_logprobs, logprobs.sizes()) : torch::stable::new_empty(ref_logprobs, {0});
  launch_kl_penalty_backward(TensorLauncher(logprobs), floats(grad), floats_of(logprobs), floats_of(ref_logprobs),
                             {grad_logprobs.mutable_data_ptr(), dtype_of(logprobs)},
                             {need_ref ? grad_ref.mutable_data_ptr() : nullptr, dtype_of(ref_logprobs)},
                             logprobs.numel(), kl_options(estimator, straight_through, log_ratio_clamp, value_clamp));
  return {grad_logprobs, grad_ref};
}

Tensor shaped_rewards(Tensor scores, Tensor logprobs, Tensor ref_logprobs, std::optional<Tensor> mask,
                      std::optional<Tensor> cu_seqlens, double kl_coef, int64_t estimator, bool after_last) {
  RewardBatch batch = {};
  batch.scores = floats_of(scores);
  batch.logprobs = floats_of(logprobs);
  batch.ref_logprobs = floats_of(ref_logprobs);
  batch.mask = flags_of(mask);
  batch.sequences = sequences_of(logprobs, cu_seqlens);
  batch.estimator = static_cast<int>(estimator);
  batch.kl_coef = static_cast<float>(kl_coef);
  batch.after_last = after_last;
  Tensor rewards = empty_like(logprobs, logprobs.sizes());
  TensorLauncher launch(logprobs);
  launch_shaped_rewards(launch, batch, rewards.mutable_data_ptr<float>());
  return rewards;
}

}  // namespace
}  // namespace rlk

STABLE_TORCH_LIBRARY_IMPL(rlkernels, RLK_CUDA_KEY, m) {
  m.impl("kl_penalty_forward.cuda", TORCH_BOX(&rlk::kl_penalty_forward));
  m.impl("kl_penalty_backward.cuda", TORCH_BOX(&rlk::kl_penalty_backward));
  m.impl("shaped_rewards.cuda", TORCH_BOX(&rlk::shaped_rewards));
}
