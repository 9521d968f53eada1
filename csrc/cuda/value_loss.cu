#include "value_loss.cuh"

namespace rlk {

void launch_value_loss(Launcher& launch, const ValueBatch& batch, float clip, const Denominator& denominator,
                       const ValueResults& results) {
  const int64_t blocks = divide_up(batch.sequences.tokens, kBlockTokens), count = batch.sequences.count;
  ValueSums* const sums = launch.room_for<ValueSums>(blocks);
  int* lengths = nullptr;
  if (denominator.needs_lengths()) {
    lengths = launch.room_for<int>(count);
    launch(value_lengths_kernel, count, kSequenceThreads, batch, lengths);
  }
  launch(value_loss_kernel, blocks, kTokenThreads, batch, clip,
         denominator.aggregation == kSeqMeanTokenMean ? lengths : nullptr, results.gradient, sums);
  launch(value_loss_finish_kernel, 1, kFinishThreads, sums, blocks, lengths, count, denominator, results.loss,
         results.metrics, results.scale);
}

}  // namespace rlk
