#include "cpu/value_loss.h"

#include "token_losses.h"

namespace rlk {
namespace {

struct CpuValueLoss : Cpu {
  static void run(const Tensor&, const ValueInputs<const float*, const bool*>& inputs, float clip,
                  const Denominator& denominator, const std::optional<Tensor>&, const ValueResults& results) {
    const ValueLoss problem = {inputs, denominator.mean_over_sequence(), clip};
    const int64_t tokens = problem.sequences.tokens, count = problem.sequences.count;
    std::vector<int64_t> lengths(denominator.needs_lengths() ? count : 0);
    std::vector<ValueSums> sums(loss_blocks(tokens));
    with_kernels<ValueLossKernels>([&](auto kernels) {
      parallel(lengths.size(), tokens / std::max<int64_t>(1, count),
               [&](int64_t begin, int64_t end) { kernels.value_loss_lengths(problem, lengths.data(), begin, end); });
      parallel(sums.size(), kLossBlock, [&](int64_t begin, int64_t end) {
        kernels.value_loss_sums(problem, lengths.data(), sums.data(), results.gradient, begin, end);
      });
    });

    const auto num_sequences = std::count_if(lengths.begin(), lengths.end(), [](int64_t n) { return n > 0; });
    ValueSums total = {};
    for (const ValueSums& block : sums) total.add(block);
    divide_loss(total.loss, denominator(total.tokens, static_cast<double>(num_sequences)), total.tokens > 0.0,
                results.loss, results.scale);
    value_metrics(total, results.metrics);
  }
};

}  // namespace
}  // namespace rlk

STABLE_TORCH_LIBRARY_IMPL(rlkernels, CPU, m) {
  m.impl("value_loss_forward.cpu", TORCH_BOX(&rlk::value_loss_forward<rlk::CpuValueLoss>));
}
