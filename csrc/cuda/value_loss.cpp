#include "value_loss.h"

#include "rlkernels/value_loss.h"
#include "tensors.h"

namespace rlk {
namespace {

std::tuple<Tensor, Tensor, Tensor, Tensor> value_loss_forward(Tensor values, std::optional<Tensor> old_values,
                                                              Tensor returns, std::optional<Tensor> mask,
                                                              std::optional<Tensor> cu_seqlens,
                                                              std::optional<Tensor> normalizer, double normalizer_value,
                                                              int64_t aggregation, double clip, bool need_grad) {
  const ValueBatch batch = {floats_of(values), floats_of(old_values), floats_of(returns), flags_of(mask),
                            sequences_of(values, cu_seqlens)};
  Tensor loss = empty_like(values, {}), metrics = empty_like(values, {kValueMetrics});
  Tensor grad = gradient_like(values, need_grad), scale = empty_like(values, {});
  TensorLauncher launch(values);
  launch_value_loss(launch, batch, static_cast<float>(clip), denominator_of(normalizer, normalizer_value, aggregation),
                    floats_of(normalizer),
                    {loss.mutable_data_ptr<float>(), metrics.mutable_data_ptr<float>(), scale.mutable_data_ptr<float>(),
                     gradient_or_null(grad, need_grad)});
  return {loss, metrics, grad, scale};
}

}  // namespace
}  // namespace rlk

STABLE_TORCH_LIBRARY_IMPL(rlkernels, RLK_CUDA_KEY, m) {
  m.impl("value_loss_forward.cuda", TORCH_BOX(&rlk::value_loss_forward));
}
