#include "logprobs.cuh"

namespace rlk {
namespace {

// Calls function(T{}, scale) with the element type of the logits and a LogitScale.
template <typename Function>
void with_types(DType dtype, const LogprobOptions& options, Function function) {
  const float t = options.temperature, c = options.softcap;
  const auto with_scale = [&](auto element) {
    if (c > 0.0f) return function(element, LogitScale<Scaling::kSoftcap>{c, t});
    if (t != 1.0f) return function(element, LogitScale<Scaling::kTemperature>{c, t});
    return function(element, LogitScale<Scaling::kNone>{c, t});
  };
  switch (dtype) {
    case DType::kBFloat16:
      return with_scale(__nv_bfloat16{});
    case DType::kFloat16:
      return with_scale(__half{});
    default:
      return with_scale(float{});
  }
}

}  // namespace

void launch_token_logprobs_forward(const Launcher& launch, const Logits& logits, const int64_t* token_ids,
                                   const LogprobOptions& options, float* logprobs, float* entropy, RowStats stats) {
  with_types(logits.dtype, options, [&]<typename T, Scaling kScaling>(T, LogitScale<kScaling> scale) {
    const auto kernel = entropy != nullptr ? token_logprobs_forward_kernel<T, kScaling, true>
                                           : token_logprobs_forward_kernel<T, kScaling, false>;
    launch(kernel, logits.count, kRowThreads, static_cast<const T*>(logits.data), logits.rows, token_ids, scale,
           options.ignore_index, logprobs, entropy, stats);
  });
}

void launch_token_logprobs_backward(const Launcher& launch, const float* grad_logprobs, const float* grad_entropy,
                                    const Logits& logits, const int64_t* token_ids, const float* logprobs,
                                    const float* entropy, RowStats stats, const LogprobOptions& options,
                                    const Logits& gradient) {
  with_types(logits.dtype, options, [&]<typename T, Scaling kScaling>(T, LogitScale<kScaling> scale) {
    launch(token_logprobs_backward_kernel<T, kScaling>, logits.count, kRowThreads, grad_logprobs, grad_entropy,
           static_cast<const T*>(logits.data), logits.rows, token_ids, logprobs, entropy, stats, scale,
           options.ignore_index, static_cast<T*>(gradient.data), gradient.rows);
  });
}

}  // namespace rlk
