#include "token_losses.h"
#include "value_loss.cuh"

namespace rlk {
namespace {

std::tuple<Tensor, Tensor, Tensor, Tensor> value_loss_forward(Tensor values, std::optional<Tensor> old_values,
                                                              Tensor returns, std::optional<Tensor> mask,
                                                              std::optional<Tensor> cu_seqlens,
                                                              std::optional<Tensor> normalizer, double normalizer_value,
                                                              int64_t aggregation, double clip, bool need_grad) {
  const Launcher launch(values);
  const ValueBatch batch = {floats(values), data_or_null<float>(old_values), floats(returns), data_or_null<bool>(mask),
                            sequences_of(values, cu_seqlens)};
  const Denominator denominator = denominator_of(normalizer, normalizer_value, aggregation);

  Tensor loss = empty_like(values, {}), metrics = empty_like(values, {kValueMetrics});
  Tensor grad = gradient_like(values, need_grad), scale = empty_like(values, {});
  const int64_t blocks = divide_up(batch.sequences.tokens, kBlockTokens), count = batch.sequences.count;
  Tensor block_sums = empty_for<ValueSums>(values, blocks);
  ValueSums* const sums = static_cast<ValueSums*>(block_sums.data_ptr());

  std::optional<Tensor> sequence_lengths;
  int* lengths = nullptr;
  if (denominator.needs_lengths()) {
    sequence_lengths = empty_like(values, {count}, ScalarType::Int);
    lengths = sequence_lengths->mutable_data_ptr<int>();
    launch(value_lengths_kernel, count, kSequenceThreads, batch, lengths);
  }
  launch(value_loss_kernel, blocks, kTokenThreads, batch, static_cast<float>(clip),
         aggregation == kSeqMeanTokenMean ? lengths : nullptr, gradient_or_null(grad, need_grad), sums);
  launch(value_loss_finish_kernel, 1, kFinishThreads, sums, blocks, lengths, count, denominator,
         loss.mutable_data_ptr<float>(), metrics.mutable_data_ptr<float>(), scale.mutable_data_ptr<float>());
  return {loss, metrics, grad, scale};
}

}  // namespace
}  // namespace rlk

STABLE_TORCH_LIBRARY_IMPL(rlkernels, RLK_CUDA_KEY, m) {
  m.impl("value_loss_forward.cuda", TORCH_BOX(&rlk::value_loss_forward));
}
