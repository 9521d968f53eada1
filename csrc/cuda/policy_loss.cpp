#include "policy_loss.h"

#include "tensors.h"
#include "token_losses.h"

namespace rlk {
namespace {

struct CudaPolicyLoss : Cuda {
  static void run(const Tensor& logprobs, const PolicyBatch& batch, const PolicyOptions& options,
                  const Denominator& denominator, const std::optional<Tensor>& normalizer,
                  const PolicyResults& results) {
    TensorLauncher launch(logprobs);
    launch_policy_loss(launch, batch, options, denominator, floats_of(normalizer), results);
  }
};

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
  m.impl("policy_loss_forward.cuda", TORCH_BOX(&rlk::policy_loss_forward<rlk::CudaPolicyLoss>));
  m.impl("token_loss_backward.cuda", TORCH_BOX(&rlk::token_loss_backward));
}
