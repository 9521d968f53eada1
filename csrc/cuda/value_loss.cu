#include "sequences.cuh"
#include "value_loss.cuh"

namespace rlk {

void launch_value_loss(Launcher& launch, const ValueBatch& batch, float clip, const Denominator& denominator,
                       Floats normalizer, const ValueResults& results) {
  const int64_t tokens = batch.sequences.tokens, count = batch.sequences.count, blocks = token_blocks(tokens);
  ValueSums* const sums = launch.room_for<ValueSums>(blocks);
  int* lengths = nullptr;
  if (denominator.needs_lengths()) {
    lengths = launch.room_for<int>(count);
    launch(value_lengths_kernel, count, kSequenceThreads, batch, lengths);
  }
  const bool plain = tokens % kRun == 0 && all_plain({batch.values, batch.old_values, batch.returns}, {batch.mask});
  const int* const used = denominator.mean_over_sequence() ? lengths : nullptr;
  const auto kernel = !plain            ? value_loss_kernel<false, true>
                      : used != nullptr ? value_loss_kernel<true, true>
                                        : value_loss_kernel<true, false>;
  launch(kernel, blocks, kTokenThreads, batch, clip, used, results.gradient, sums);
  const LossEnd end = {denominator, normalizer, launch_valid(launch, batch.sequences), results.loss, results.scale};
  launch(value_loss_finish_kernel, 1, kFinishThreads, sums, blocks, lengths, count, end, results.metrics);
}

}  // namespace rlk
