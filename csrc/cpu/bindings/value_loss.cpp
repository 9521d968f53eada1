#include "cpu/value_loss.h"

#include "token_losses.h"

namespace rlk {
namespace {

std::tuple<Tensor, Tensor, Tensor, Tensor> value_loss_forward(Tensor values, std::optional<Tensor> old_values,
                                                              Tensor returns, std::optional<Tensor> mask,
                                                              std::optional<Tensor> cu_seqlens,
                                                              std::optional<Tensor> normalizer, double normalizer_value,
                                                              int64_t aggregation, double clip, bool need_grad) {
  const ValueLoss problem = {
      floats(values),           data_or_null<float>(old_values),  floats(returns),
      data_or_null<bool>(mask), sequences_of(values, cu_seqlens), aggregation == kSeqMeanTokenMean,
      static_cast<float>(clip)};
  const Denominator denominator = denominator_of(normalizer, normalizer_value, aggregation);

  Tensor loss = empty_floats({}), metrics = empty_floats({kValueMetrics}), scale = empty_floats({});
  Tensor grad = gradient_like(values, need_grad);
  float* const grad_data = gradient_or_null(grad, need_grad);
  const int64_t tokens = problem.sequences.tokens, count = problem.sequences.count;
  std::vector<int64_t> lengths(denominator.needs_lengths() ? count : 0);
  std::vector<ValueSums> sums(loss_blocks(tokens));
  with_kernels<ValueLossKernels>([&](auto kernels) {
    parallel(lengths.size(), tokens / std::max<int64_t>(1, count),
             [&](int64_t begin, int64_t end) { kernels.value_loss_lengths(problem, lengths.data(), begin, end); });
    parallel(sums.size(), kLossBlock, [&](int64_t begin, int64_t end) {
      kernels.value_loss_sums(problem, lengths.data(), sums.data(), grad_data, begin, end);
    });
  });

  const auto num_sequences = std::count_if(lengths.begin(), lengths.end(), [](int64_t n) { return n > 0; });
  ValueSums total = {};
  for (const ValueSums& block : sums) total.add(block);
  divide_loss(total.loss, denominator(total.tokens, static_cast<double>(num_sequences)), total.tokens > 0.0, loss,
              scale);
  value_metrics(total, metrics.mutable_data_ptr<float>());
  return {loss, metrics, grad, scale};
}

}  // namespace
}  // namespace rlk

STABLE_TORCH_LIBRARY_IMPL(rlkernels, CPU, m) { m.impl("value_loss_forward.cpu", TORCH_BOX(&rlk::value_loss_forward)); }
