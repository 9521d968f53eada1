#include "cpu/policy_loss.h"

#include "token_losses.h"

namespace rlk {
namespace {

struct CpuPolicyLoss : Cpu {
  static void run(const Tensor&, const PolicyInputs<const float*, const bool*>& inputs, const PolicyOptions& options,
                  const Denominator& denominator, const std::optional<Tensor>&, const PolicyResults& results) {
    const PolicyLoss problem = {inputs, denominator.mean_over_sequence(), options};
    const int64_t tokens = problem.sequences.tokens, count = problem.sequences.count;
    std::vector<SequenceFactors> factors(problem.options.needs_sequences() || denominator.needs_lengths() ? count : 0);
    std::vector<PolicySums> sums(loss_blocks(tokens));
    with_kernels<PolicyLossKernels>([&](auto kernels) {
      parallel(factors.size(), tokens / std::max<int64_t>(1, count),
               [&](int64_t begin, int64_t end) { kernels.policy_loss_sequences(problem, factors.data(), begin, end); });
      parallel(sums.size(), kLossBlock, [&](int64_t begin, int64_t end) {
        kernels.policy_loss_sums(problem, factors.empty() ? nullptr : factors.data(), sums.data(), results.gradient,
                                 results.entropy_gradient, begin, end);
      });
    });

    int64_t num_sequences = 0;
    for (const SequenceFactors& sequence : factors) num_sequences += sequence.length > 0.0f;
    PolicySums total = {};
    for (const PolicySums& block : sums) {
      total.loss += block.loss;
      total.tokens += block.tokens;
      for (int k = 0; k < kPolicyMeans; ++k) total.means[k] += block.means[k];
    }
    const bool scored = total.tokens > 0.0;
    divide_loss(total.loss, denominator(total.tokens, static_cast<double>(num_sequences)), scored, results.loss,
                results.scale);
    for (int k = 0; k < kPolicyMeans; ++k)
      results.metrics[k] = scored ? static_cast<float>(total.means[k] / total.tokens) : 0.0f;
    results.metrics[kNumTokens] = static_cast<float>(total.tokens);
  }
};

}  // namespace
}  // namespace rlk

STABLE_TORCH_LIBRARY_IMPL(rlkernels, CPU, m) {
  m.impl("policy_loss_forward.cpu", TORCH_BOX(&rlk::policy_loss_forward<rlk::CpuPolicyLoss>));
}
