#include "recurrence.h"

#include "tensors.h"

namespace rlk {
namespace {

std::tuple<Tensor, Tensor> recurrence(Tensor rewards, std::optional<Tensor> values, std::optional<Tensor> logprobs,
                                      std::optional<Tensor> behavior_logprobs, std::optional<Tensor> mask,
                                      std::optional<Tensor> dones, std::optional<Tensor> cu_seqlens,
                                      std::optional<Tensor> bootstrap_values, int64_t kind, double gamma, double lam,
                                      double rho_clip, double c_clip, bool whiten) {
  const bool advantageous = has_advantages(static_cast<int>(kind));
  Tensor advantages = advantageous ? empty_like(rewards, rewards.sizes()) : empty_like(rewards, {0});
  Tensor returns = empty_like(rewards, rewards.sizes());
  if (rewards.numel() == 0) return {advantages, returns};

  RecurrenceBatch batch = {};
  batch.rewards = floats_of(rewards);
  batch.values = floats_of(values);
  batch.logprobs = floats_of(logprobs);
  batch.behavior_logprobs = floats_of(behavior_logprobs);
  batch.mask = flags_of(mask);
  batch.dones = flags_of(dones);
  batch.bootstrap_values = floats_of(bootstrap_values);
  batch.sequences = sequences_of(rewards, cu_seqlens);
  batch.options = make_recurrence_options(static_cast<int>(kind), gamma, lam, rho_clip, c_clip);
  batch.advantages = advantageous ? advantages.mutable_data_ptr<float>() : nullptr;
  batch.returns = returns.mutable_data_ptr<float>();
  TensorLauncher launch(rewards);
  launch_recurrence(launch, batch, static_cast<int>(kind), whiten);
  return {advantages, returns};
}

}  // namespace
}  // namespace rlk

STABLE_TORCH_LIBRARY_IMPL(rlkernels, RLK_CUDA_KEY, m) { m.impl("recurrence.cuda", TORCH_BOX(&rlk::recurrence)); }
