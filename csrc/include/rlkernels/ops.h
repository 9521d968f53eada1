// The ops that both devices define alike: the arguments become what a device's kernels read, and the tensors that they
// write. A Device has the types of its arrays, Array and FlagArray, and static functions: `array`, `flags`, `sequences`
// and `denominator` convert arguments, and `run` runs the kernels.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>
#include <tuple>

#include "rlkernels/kl.h"
#include "rlkernels/policy_loss.h"
#include "rlkernels/recurrence.h"
#include "rlkernels/value_loss.h"

namespace rlk {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline const float* floats(const Tensor& tensor) { return tensor.const_data_ptr<float>(); }
inline float* mutable_floats(Tensor& tensor) { return tensor.mutable_data_ptr<float>(); }

template <typename T>
const T* data_or_null(const std::optional<Tensor>& tensor) {
  return tensor ? tensor->const_data_ptr<T>() : nullptr;
}

inline Tensor empty_like(const Tensor& tensor, torch::headeronly::IntHeaderOnlyArrayRef sizes,
                         ScalarType dtype = ScalarType::Float) {
  return torch::stable::new_empty(tensor, sizes, dtype);
}

// An output that nobody asked for is empty.
inline Tensor output_like(const Tensor& tensor, bool wanted) {
  return wanted ? empty_like(tensor, tensor.sizes()) : empty_like(tensor, {0});
}

inline float* output_or_null(Tensor& output, bool wanted) { return wanted ? mutable_floats(output) : nullptr; }

template <typename Device>
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> policy_loss_forward(
    Tensor logprobs, std::optional<Tensor> old_logprobs, Tensor advantages, std::optional<Tensor> mask,
    std::optional<Tensor> cu_seqlens, std::optional<Tensor> ref_logprobs, std::optional<Tensor> sampler_logprobs,
    std::optional<Tensor> entropy, std::optional<Tensor> normalizer, double normalizer_value, int64_t aggregation,
    int64_t objective, double clip_low, double clip_high, double dual_clip, double delta, double log_ratio_clamp,
    double k_pos, double k_neg, double rate_pos, double rate_neg, double kl_coef, int64_t kl_estimator,
    bool kl_straight_through, double entropy_coef, int64_t sampler_correction, double sampler_cap, bool need_grad,
    bool need_entropy_grad) {
  const bool advantage_per_token = advantages.dim() == logprobs.dim() && advantages.numel() == logprobs.numel();
  const PolicyInputs<typename Device::Array, typename Device::FlagArray> inputs = {
      Device::array(logprobs),         Device::array(old_logprobs), Device::array(ref_logprobs),
      Device::array(sampler_logprobs), Device::array(entropy),      Device::flags(mask),
      Device::array(advantages),       advantage_per_token,         Device::sequences(logprobs, cu_seqlens)};
  PolicyOptions options =
      make_policy_options(static_cast<int>(objective), clip_low, clip_high, dual_clip, delta, log_ratio_clamp, k_pos,
                          k_neg, rate_pos, rate_neg, kl_coef, static_cast<int>(kl_estimator), kl_straight_through,
                          entropy_coef, static_cast<int>(sampler_correction), sampler_cap);
  options.has_ref = ref_logprobs.has_value();
  options.has_sampler = sampler_logprobs.has_value();
  options.has_entropy = entropy.has_value();

  Tensor loss = empty_like(logprobs, {}), metrics = empty_like(logprobs, {kPolicyMetrics});
  Tensor grad = output_like(logprobs, need_grad), entropy_grad = output_like(logprobs, need_entropy_grad);
  Tensor scale = empty_like(logprobs, {});
  Device::run(logprobs, inputs, options, Device::denominator(normalizer, normalizer_value, aggregation), normalizer,
              PolicyResults{mutable_floats(loss), mutable_floats(metrics), mutable_floats(scale),
                            output_or_null(grad, need_grad), output_or_null(entropy_grad, need_entropy_grad)});
  return {loss, metrics, grad, entropy_grad, scale};
}

template <typename Device>
std::tuple<Tensor, Tensor, Tensor, Tensor> value_loss_forward(Tensor values, std::optional<Tensor> old_values,
                                                              Tensor returns, std::optional<Tensor> mask,
                                                              std::optional<Tensor> cu_seqlens,
                                                              std::optional<Tensor> normalizer, double normalizer_value,
                                                              int64_t aggregation, double clip, bool need_grad) {
  const ValueInputs<typename Device::Array, typename Device::FlagArray> inputs = {
      Device::array(values), Device::array(old_values), Device::array(returns), Device::flags(mask),
      Device::sequences(values, cu_seqlens)};
  Tensor loss = empty_like(values, {}), metrics = empty_like(values, {kValueMetrics});
  Tensor grad = output_like(values, need_grad), scale = empty_like(values, {});
  Device::run(values, inputs, static_cast<float>(clip), Device::denominator(normalizer, normalizer_value, aggregation),
              normalizer,
              ValueResults{mutable_floats(loss), mutable_floats(metrics), mutable_floats(scale),
                           output_or_null(grad, need_grad)});
  return {loss, metrics, grad, scale};
}

template <typename Device>
std::tuple<Tensor, Tensor> recurrence(Tensor rewards, std::optional<Tensor> values, std::optional<Tensor> logprobs,
                                      std::optional<Tensor> behavior_logprobs, std::optional<Tensor> mask,
                                      std::optional<Tensor> dones, std::optional<Tensor> cu_seqlens,
                                      std::optional<Tensor> bootstrap_values, int64_t kind, double gamma, double lam,
                                      double rho_clip, double c_clip, bool whiten) {
  const RecurrenceInputs<typename Device::Array, typename Device::FlagArray> inputs = {
      Device::array(rewards),
      Device::array(values),
      Device::array(logprobs),
      Device::array(behavior_logprobs),
      Device::flags(mask),
      Device::flags(dones),
      Device::array(bootstrap_values),
      Device::sequences(rewards, cu_seqlens)};
  const int of_kind = static_cast<int>(kind);
  const bool advantageous = has_advantages(of_kind);
  Tensor advantages = output_like(rewards, advantageous), returns = output_like(rewards, true);
  Device::run(rewards, inputs, of_kind, make_recurrence_options(of_kind, gamma, lam, rho_clip, c_clip), whiten,
              output_or_null(advantages, advantageous), mutable_floats(returns));
  return {advantages, returns};
}

template <typename Device>
Tensor shaped_rewards(Tensor scores, Tensor logprobs, Tensor ref_logprobs, std::optional<Tensor> mask,
                      std::optional<Tensor> cu_seqlens, double kl_coef, int64_t estimator, bool after_last) {
  const RewardInputs<typename Device::Array, typename Device::FlagArray> inputs = {
      Device::array(scores),
      Device::array(logprobs),
      Device::array(ref_logprobs),
      Device::flags(mask),
      Device::sequences(logprobs, cu_seqlens),
      static_cast<int>(estimator),
      static_cast<float>(kl_coef),
      after_last};
  Tensor rewards = empty_like(logprobs, logprobs.sizes());
  Device::run(logprobs, inputs, mutable_floats(rewards));
  return rewards;
}

}  // namespace rlk
