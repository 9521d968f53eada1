#include "launch.h"
#include "policy_loss.cuh"

namespace rlk {
namespace {

constexpr int kSequenceThreads = 128;
constexpr int kFinishThreads = kWarp * kMaxWarps;

std::tuple<Tensor, Tensor, Tensor, Tensor> policy_loss_forward(
    Tensor logprobs, std::optional<Tensor> old_logprobs, Tensor advantages, std::optional<Tensor> mask,
    std::optional<Tensor> cu_seqlens, std::optional<Tensor> ref_logprobs, std::optional<Tensor> normalizer,
    double normalizer_value, int64_t objective, int64_t aggregation, double clip_low, double clip_high,
    double dual_clip, double log_ratio_clamp, double kl_coef, int64_t kl_estimator, bool kl_straight_through) {
  const Launcher launch(logprobs);
  PolicyBatch batch = {};
  batch.logprobs = floats(logprobs);
  batch.old_logprobs = data_or_null<float>(old_logprobs);
  batch.ref_logprobs = data_or_null<float>(ref_logprobs);
  batch.mask = data_or_null<bool>(mask);
  batch.advantages = floats(advantages);
  batch.advantage_per_token = advantages.dim() == logprobs.dim() && advantages.numel() == logprobs.numel();
  batch.sequences = sequences_of(logprobs, cu_seqlens);
  const PolicyOptions options =
      make_policy_options(static_cast<int>(objective), ref_logprobs.has_value(), clip_low, clip_high, dual_clip,
                          log_ratio_clamp, kl_coef, static_cast<int>(kl_estimator), kl_straight_through);

  Tensor loss = empty_like(logprobs, {}), metrics = empty_like(logprobs, {kPolicyMetrics});
  Tensor gradient = empty_like(logprobs, logprobs.sizes()), scale = empty_like(logprobs, {});
  const int64_t blocks = divide_up(batch.sequences.tokens, kBlockTokens);
  Tensor block_sums = empty_like(logprobs, {blocks, sizeof(PolicySums) / sizeof(float)});
  PolicySums* const sums = static_cast<PolicySums*>(block_sums.data_ptr());

  std::optional<Tensor> sequence_lengths;
  int* lengths = nullptr;
  if (aggregation == kSeqMeanTokenMean || aggregation == kSeqMeanTokenSum) {
    sequence_lengths = empty_like(logprobs, {batch.sequences.count}, ScalarType::Int);
    lengths = sequence_lengths->mutable_data_ptr<int>();
    launch(sequence_lengths_kernel, batch.sequences.count, kSequenceThreads, batch, lengths);
  }
  launch(policy_loss_kernel, blocks, kTokenThreads, batch, options,
         aggregation == kSeqMeanTokenMean ? lengths : nullptr, gradient.mutable_data_ptr<float>(), sums);
  const Denominator denominator = {data_or_null<float>(normalizer), static_cast<float>(normalizer_value),
                                   static_cast<int>(aggregation)};
  launch(policy_loss_finish_kernel, 1, kFinishThreads, sums, blocks, lengths, batch.sequences.count, denominator,
         loss.mutable_data_ptr<float>(), metrics.mutable_data_ptr<float>(), scale.mutable_data_ptr<float>());
  return {loss, metrics, gradient, scale};
}

}  // namespace
}  // namespace rlk

STABLE_TORCH_LIBRARY_IMPL(rlkernels, RLK_CUDA_KEY, m) {
  m.impl("policy_loss_forward.cuda", TORCH_BOX(&rlk::policy_loss_forward));
}
