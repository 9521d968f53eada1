#include "kl.h"

#include "tensors.h"

namespace rlk {
namespace {

Tensor kl_penalty_forward(Tensor logprobs, Tensor ref_logprobs, int64_t estimator, bool straight_through,
                          double log_ratio_clamp, double value_clamp) {
  Tensor penalty = empty_like(logprobs, logprobs.sizes());
  launch_kl_penalty_forward(TensorLauncher(logprobs), floats_of(logprobs), floats_of(ref_logprobs),
                            penalty.mutable_data_ptr<float>(), logprobs.numel(),
                            make_kl_options(estimator, straight_through, log_ratio_clamp, value_clamp));
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
                             logprobs.numel(),
                             make_kl_options(estimator, straight_through, log_ratio_clamp, value_clamp));
  return {grad_logprobs, grad_ref};
}

struct CudaShapedRewards : Cuda {
  static void run(const Tensor& logprobs, const RewardInputs<Floats, Flags>& inputs, float* rewards) {
    TensorLauncher launch(logprobs);
    launch_shaped_rewards(launch, {inputs, nullptr}, rewards);
  }
};

}  // namespace
}  // namespace rlk

STABLE_TORCH_LIBRARY_IMPL(rlkernels, RLK_CUDA_KEY, m) {
  m.impl("kl_penalty_forward.cuda", TORCH_BOX(&rlk::kl_penalty_forward));
  m.impl("kl_penalty_backward.cuda", TORCH_BOX(&rlk::kl_penalty_backward));
  m.impl("shaped_rewards.cuda", TORCH_BOX(&rlk::shaped_rewards<rlk::CudaShapedRewards>));
}
