#include <array>
#include <utility>

#include "policy_loss.cuh"

namespace rlk {
namespace {

template <size_t... kObjective>
constexpr auto kernels_of(std::index_sequence<kObjective...>) {
  return std::array{policy_loss_kernel<static_cast<int>(kObjective)>...};
}

}  // namespace

void launch_policy_loss(Launcher& launch, const PolicyBatch& batch, const PolicyOptions& options,
                        const Denominator& denominator, const PolicyResults& results) {
  const int64_t blocks = divide_up(batch.sequences.tokens, kBlockTokens), count = batch.sequences.count;
  PolicySums* const sums = launch.room_for<PolicySums>(blocks);
  SequenceFactors* factors = nullptr;
  if (options.needs_sequences() || denominator.needs_lengths()) {
    factors = launch.room_for<SequenceFactors>(count);
    launch(policy_sequences_kernel, count, kSequenceThreads, batch, options, factors);
  }
  const bool mean_over_sequence = denominator.aggregation == kSeqMeanTokenMean;
  const SequenceFactors* const used = options.needs_sequences() || mean_over_sequence ? factors : nullptr;
  static constexpr auto kKernels = kernels_of(std::make_index_sequence<kObjectives>());
  launch(kKernels[options.objective], blocks, kTokenThreads, batch, options, used, mean_over_sequence, results.gradient,
         results.entropy_gradient, sums);
  launch(policy_loss_finish_kernel, 1, kFinishThreads, sums, blocks, factors, count, denominator, results.loss,
         results.metrics, results.scale);
}

}  // namespace rlk
