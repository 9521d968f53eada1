#include "cpu/kl.h"

#include <algorithm>
#include <functional>

#include "bindings.h"

namespace rlk {
namespace {

Tensor kl_penalty_forward(Tensor logprobs, Tensor ref_logprobs, int64_t estimator, bool straight_through,
                          double log_ratio_clamp, double value_clamp) {
  const KlOptions options = make_kl_options(estimator, straight_through, log_ratio_clamp, value_clamp);
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
  const KlOptions options = make_kl_options(estimator, straight_through, log_ratio_clamp, value_clamp);
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

struct CpuShapedRewards : Cpu {
  static void run(const Tensor&, const ShapedRewards& problem, float* rewards) {
    const int64_t tokens = problem.sequences.tokens, count = problem.sequences.count;
    with_kernels<KlKernels>([&](auto kernels) {
      parallel(tokens, 1, [&](int64_t begin, int64_t end) { kernels.shape_rewards(problem, rewards, begin, end); });
      parallel(count, tokens / std::max<int64_t>(1, count),
               [&](int64_t begin, int64_t end) { kernels.add_scores(problem, rewards, begin, end); });
    });
  }
};

}  // namespace
}  // namespace rlk

STABLE_TORCH_LIBRARY_IMPL(rlkernels, CPU, m) {
  m.impl("kl_penalty_forward.cpu", TORCH_BOX(&rlk::kl_penalty_forward));
  m.impl("kl_penalty_backward.cpu", TORCH_BOX(&rlk::kl_penalty_backward));
  m.impl("shaped_rewards.cpu", TORCH_BOX(&rlk::shaped_rewards<rlk::CpuShapedRewards>));
}
