#include "logprobs.h"

#include <climits>

#include "tensors.h"

namespace rlk {
namespace {

DType dtype_of(const Tensor& logits) {
  if (logits.scalar_type() == ScalarType::BFloat16) return DType::kBFloat16;
  if (logits.scalar_type() == ScalarType::Half) return DType::kFloat16;
  return DType::kFloat32;
}

Logits logits_of(const Tensor& tensor) {
  if (tensor.size(2) > INT_MAX) throw std::runtime_error("logits have more than 2^31 - 1 columns");
  const LogitRows rows = {tensor.size(1), tensor.stride(0), tensor.stride(1), static_cast<int>(tensor.size(2))};
  return {tensor.data_ptr(), dtype_of(tensor), rows, tensor.size(0) * tensor.size(1)};
}

RowStats row_stats_of(const Tensor& row_stats) {
  float* const max = static_cast<float*>(row_stats.data_ptr());
  return {max, max + row_stats.size(1) * row_stats.size(2)};
}

LogprobOptions options_of(double temperature, double softcap, int64_t ignore_index) {
  return {static_cast<float>(temperature), static_cast<float>(softcap), ignore_index};
}

std::tuple<Tensor, Tensor, Tensor> token_logprobs_forward(Tensor logits, Tensor token_ids, double temperature,
                                                          double softcap, int64_t ignore_index, bool return_entropy) {
  Tensor logprobs = empty_like(logits, token_ids.sizes());
  Tensor entropy = return_entropy ? empty_like(logits, token_ids.sizes()) : empty_like(logits, {0});
  Tensor row_stats = empty_like(logits, {2, logits.size(0), logits.size(1)});
  launch_token_logprobs_forward(TensorLauncher(logits), logits_of(logits), token_ids.const_data_ptr<int64_t>(),
                                options_of(temperature, softcap, ignore_index), logprobs.mutable_data_ptr<float>(),
                                return_entropy ? entropy.mutable_data_ptr<float>() : nullptr, row_stats_of(row_stats));
  return {logprobs, entropy, row_stats};
}

void write_gradient(const std::optional<Tensor>& grad_logprobs, const std::optional<Tensor>& grad_entropy,
                    const Tensor& logits, const Tensor& token_ids, const Tensor& logprobs, const Tensor& entropy,
                    const Tensor& row_stats, const LogprobOptions& options, const Tensor& gradient) {
  launch_token_logprobs_backward(TensorLauncher(logits), data_or_null<float>(grad_logprobs),
                                 data_or_null<float>(grad_entropy), logits_of(logits),
                                 token_ids.const_data_ptr<int64_t>(), floats(logprobs), floats(entropy),
                                 row_stats_of(row_stats), options, logits_of(gradient));
}

Tensor token_logprobs_backward(std::optional<Tensor> grad_logprobs, std::optional<Tensor> grad_entropy, Tensor logits,
                               Tensor token_ids, Tensor logprobs, Tensor entropy, Tensor row_stats, double temperature,
                               double softcap, int64_t ignore_index) {
  Tensor gradient = empty_like(logits, logits.sizes(), logits.scalar_type());
  write_gradient(grad_logprobs, grad_entropy, logits, token_ids, logprobs, entropy, row_stats,
                 options_of(temperature, softcap, ignore_index), gradient);
  return gradient;
}

void token_logprobs_backward_(std::optional<Tensor> grad_logprobs, std::optional<Tensor> grad_entropy, Tensor logits,
                              Tensor token_ids, Tensor logprobs, Tensor entropy, Tensor row_stats, double temperature,
                              double softcap, int64_t ignore_index) {
  write_gradient(grad_logprobs, grad_entropy, logits, token_ids, logprobs, entropy, row_stats,
                 options_of(temperature, softcap, ignore_index), logits);
}

}  // namespace
}  // namespace rlk

STABLE_TORCH_LIBRARY_IMPL(rlkernels, RLK_CUDA_KEY, m) {
  m.impl("token_logprobs_forward.cuda", TORCH_BOX(&rlk::token_logprobs_forward));
  m.impl("token_logprobs_backward.cuda", TORCH_BOX(&rlk::token_logprobs_backward));
  m.impl("token_logprobs_backward_.cuda", TORCH_BOX(&rlk::token_logprobs_backward_));
}
