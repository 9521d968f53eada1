#include <climits>

#include "launch.h"
#include "logprobs.cuh"

namespace rlk {
namespace {

LogitRows logit_rows(const Tensor& logits) {
  if (logits.size(2) > INT_MAX) throw std::runtime_error("logits have more than 2^31 - 1 columns");
  return {logits.size(1), logits.stride(0), logits.stride(1), static_cast<int>(logits.size(2))};
}

RowStats row_stats_of(const Tensor& row_stats) {
  float* const max = static_cast<float*>(row_stats.data_ptr());
  return {max, max + row_stats.size(1) * row_stats.size(2)};
}

// Calls function(T{}, scale) with the element type of the logits and a LogitScale.
template <typename Function>
void with_types(const Tensor& logits, double temperature, double softcap, Function function) {
  const float t = static_cast<float>(temperature), c = static_cast<float>(softcap);
  const auto with_scale = [&](auto element) {
    if (c > 0.0f) return function(element, LogitScale<Scaling::kSoftcap>{c, t});
    if (t != 1.0f) return function(element, LogitScale<Scaling::kTemperature>{c, t});
    return function(element, LogitScale<Scaling::kNone>{c, t});
  };
  switch (logits.scalar_type()) {
    case ScalarType::BFloat16:
      return with_scale(__nv_bfloat16{});
    case ScalarType::Half:
      return with_scale(__half{});
    default:
      return with_scale(float{});
  }
}

std::tuple<Tensor, Tensor, Tensor> token_logprobs_forward(Tensor logits, Tensor token_ids, double temperature,
                                                          double softcap, int64_t ignore_index, bool return_entropy) {
  const Launcher launch(logits);
  Tensor logprobs = empty_like(logits, token_ids.sizes());
  Tensor entropy = return_entropy ? empty_like(logits, token_ids.sizes()) : empty_like(logits, {0});
  Tensor row_stats = empty_like(logits, {2, logits.size(0), logits.size(1)});
  with_types(logits, temperature, softcap, [&]<typename T, Scaling kScaling>(T, LogitScale<kScaling> scale) {
    const auto kernel = return_entropy ? token_logprobs_forward_kernel<T, kScaling, true>
                                       : token_logprobs_forward_kernel<T, kScaling, false>;
    launch(kernel, token_ids.numel(), kRowThreads, static_cast<const T*>(logits.data_ptr()), logit_rows(logits),
           token_ids.const_data_ptr<int64_t>(), scale, ignore_index, logprobs.mutable_data_ptr<float>(),
           entropy.mutable_data_ptr<float>(), row_stats_of(row_stats));
  });
  return {logprobs, entropy, row_stats};
}

void write_gradient(const std::optional<Tensor>& grad_logprobs, const std::optional<Tensor>& grad_entropy,
                    const Tensor& logits, const Tensor& token_ids, const Tensor& logprobs, const Tensor& entropy,
                    const Tensor& row_stats, double temperature, double softcap, int64_t ignore_index,
                    const Tensor& gradient) {
  const Launcher launch(logits);
  with_types(logits, temperature, softcap, [&]<typename T, Scaling kScaling>(T, LogitScale<kScaling> scale) {
    launch(token_logprobs_backward_kernel<T, kScaling>, token_ids.numel(), kRowThreads,
           data_or_null<float>(grad_logprobs), data_or_null<float>(grad_entropy),
           static_cast<const T*>(logits.data_ptr()), logit_rows(logits), token_ids.const_data_ptr<int64_t>(),
           floats(logprobs), floats(entropy), row_stats_of(row_stats), scale, ignore_index,
           static_cast<T*>(gradient.data_ptr()), logit_rows(gradient));
  });
}

Tensor token_logprobs_backward(std::optional<Tensor> grad_logprobs, std::optional<Tensor> grad_entropy, Tensor logits,
                               Tensor token_ids, Tensor logprobs, Tensor entropy, Tensor row_stats, double temperature,
                               double softcap, int64_t ignore_index) {
  Tensor gradient = empty_like(logits, logits.sizes(), logits.scalar_type());
  write_gradient(grad_logprobs, grad_entropy, logits, token_ids, logprobs, entropy, row_stats, temperature, softcap,
                 ignore_index, gradient);
  return gradient;
}

void token_logprobs_backward_(std::optional<Tensor> grad_logprobs, std::optional<Tensor> grad_entropy, Tensor logits,
                              Tensor token_ids, Tensor logprobs, Tensor entropy, Tensor row_stats, double temperature,
                              double softcap, int64_t ignore_index) {
  write_gradient(grad_logprobs, grad_entropy, logits, token_ids, logprobs, entropy, row_stats, temperature, softcap,
                 ignore_index, logits);
}

}  // namespace
}  // namespace rlk

STABLE_TORCH_LIBRARY_IMPL(rlkernels, RLK_CUDA_KEY, m) {
  m.impl("token_logprobs_forward.cuda", TORCH_BOX(&rlk::token_logprobs_forward));
  m.impl("token_logprobs_backward.cuda", TORCH_BOX(&rlk::token_logprobs_backward));
  m.impl("token_logprobs_backward_.cuda", TORCH_BOX(&rlk::token_logprobs_backward_));
}
