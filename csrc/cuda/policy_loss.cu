#include <array>
#include <utility>

#include "policy_loss.cuh"
#include "sequences.cuh"

namespace rlk {
namespace {

template <bool kPlain, bool kExtras, size_t... kObjective>
constexpr auto kernels_of(std::index_sequence<kObjective...>) {
  return std::array{policy_loss_kernel<static_cast<int>(kObjective), kPlain, kExtras>...};
}

template <bool kPlain, bool kExtras>
constexpr auto kKernels = kernels_of<kPlain, kExtras>(std::make_index_sequence<kObjectives>());

bool has_extras(const PolicyBatch& batch, const PolicyOptions& o) {
  const bool long_or_packed = batch.sequences.cu_seqlens != nullptr || batch.sequences.tokens > INT32_MAX;
  return long_or_packed || o.has_ref || o.has_sampler || o.has_entropy || o.has_dual_clip || o.has_delta ||
         o.has_log_ratio_clamp;
}

}  // namespace

void launch_policy_loss(Launcher& launch, const PolicyBatch& batch, const PolicyOptions& options,
                        const Denominator& denominator, Floats normalizer, const PolicyResults& results) {
  const int64_t tokens = batch.sequences.tokens, count = batch.sequences.count, blocks = token_blocks(tokens);
  PolicySums* const sums = launch.room_for<PolicySums>(blocks);
  SequenceFactors* factors = nullptr;
  if (options.needs_sequences() || denominator.needs_lengths()) {
    factors = launch.room_for<SequenceFactors>(count);
    launch(policy_sequences_kernel, count, kSequenceThreads, batch, options, factors);
  }
  const bool mean_over_sequence = denominator.mean_over_sequence();
  const SequenceFactors* const used = options.needs_sequences() || mean_over_sequence ? factors : nullptr;
  const bool plain = tokens % kRun == 0 && all_plain({batch.logprobs, batch.old_logprobs, batch.ref_logprobs,
                                                      batch.sampler_logprobs, batch.entropy, batch.advantages},
                                                     {batch.mask});
  const auto& kernels = !plain                                          ? kKernels<false, true>
                        : used != nullptr || has_extras(batch, options) ? kKernels<true, true>
                                                                        : kKernels<true, false>;
  launch(kernels[options.objective], blocks, kTokenThreads, batch, options, used, mean_over_sequence, results.gradient,
         results.entropy_gradient, sums);
  const LossEnd end = {denominator, normalizer, launch_valid(launch, batch.sequences), results.loss, results.scale};
  launch(policy_loss_finish_kernel, 1, kFinishThreads, sums, blocks, factors, count, end, results.metrics);
}

void launch_token_loss_backward(Launcher& launch, const ScaledGradient& by_logprobs, const ScaledGradient& by_entropy,
                                const float* scale, const float* grad_loss) {
  const int64_t first_blocks = divide_up(by_logprobs.count, kTile);
  launch(token_loss_backward_kernel, first_blocks + divide_up(by_entropy.count, kTile), kTokenThreads, by_logprobs,
         by_entropy, first_blocks, scale, grad_loss);
}

}  // namespace rlk
