#include "cpu/kl.h"

#include <algorithm>
#include <functional>

#include "bindings.h"

namespace rlk {
namespace {

Tensor kl_penalty_forward(Tensor logprobs, Tensor ref_logprobs, int64_t estimator, bool straight_through,
                          double log_ratio_clamp, double value_clamp) {
  const KlPenalty options = {static_cast<int>(estimator), straight_through, static_cast<float>(log_ratio_clamp),
                             static_cast<float>(value_clamp)};
  Tensor penalty = empty_floats(logprobs.sizes());
  with_kernels<KlKernels>([&](auto kernels) {
    parallel(logprobs.numel(), 1, [&](int64_t begin, int64_t end) {
      kernels.kl_penalty_forward(options, floats(logprobs), floats(ref_logprobs), penalty.mutable_data_ptr<float>(),
                                 begin, end);
    });
  });
  return penalty;
}

std::tuple<Tensor, Tensor> kl_penalty_backward(Tensor grad, Tensor logprobs, Tensor ref_logprobs, int64_t estimator,
                                               bool straight_through, double log_ratio_clamp, double value_clamp,
                                               bool need_ref) {
  const KlPenalty options = {static_cast<int>(estimator), straight_through, static_cast<float>(log_ratio_clamp),
                             static_cast<float>(value_clamp)};
  Tensor grad_logprobs = empty_floats(logprobs.sizes());
  with_kernels<KlKernels>([&](auto kernels) {
    parallel(logprobs.numel(), 1, [&](int64_t begin, int64_t end) {
      kernels.kl_penalty_backward(options, floats(grad), floats(logprobs), floats(ref_logprobs),
                                  grad_logprobs.mutable_data_ptr<float>(), begin, end);
    });
  });
  if (!need_ref) return {grad_logprobs, empty_floats({0})};
  Tensor grad_ref = empty_floats(logprobs.sizes());
  const float* const from = floats(grad_logprobs);
  float* const to = grad_ref.mutable_data_ptr<float>();
  parallel(logprobs.numel(), 1,
           [&](int64_t begin, int64_t end) { std::transform(from + begin, from + end, to + begin, std::negate<>()); });
  return {grad_logprobs, grad_ref};
}

Tensor shaped_rewards(Tensor scores, Tensor logprobs, Tensor ref_logprobs, std::optional<Tensor> mask,
                      std::optional<Tensor> cu_seqlens, double kl_coef, int64_t estimator, bool after_last) {
  const ShapedRewards problem = {floats(scores),
                                 floats(logprobs),
                                 floats(ref_logprobs),
                                 data_or_null<bool>(mask),
                                 sequences_of(logprobs, cu_seqlens),
                                 static_cast<int>(estimator),
                                 static_cast<float>(kl_coef),
                                 after_last};
  Tensor rewards = empty_floats(logprobs.sizes());
  float* const out = rewards.mutable_data_ptr<float>();
  const int64_t tokens = problem.sequences.tokens, count = problem.sequences.count;
  with_kernels<KlKernels>([&](auto kernels) {
    parallel(tokens, 1, [&](int64_t begin, int64_t end) { kernels.shape_rewards(problem, out, begin, end); });
    parallel(count, tokens / std::max<int64_t>(1, count),
             [&](int64_t begin, int64_t end) { kernels.add_scores(problem, out, begin, end); });
  });
  return rewards;
}

}  // namespace
}  // namespace rlk

STABLE_TORCH_LIBRARY_IMPL(rlkernels, CPU, m) {
  m.impl("kl_penalty_forward.cpu", TORCH_BOX(&rlk::kl_penalty_forward));
  m.impl("kl_penalty_backward.cpu", TORCH_BOX(&rlk::kl_penalty_backward));
  m.impl("shaped_rewards.cpu", TORCH_BOX(&rlk::shaped_rewards));
}
