#include "kl.cuh"
#include "sequences.cuh"

namespace rlk {

void launch_kl_penalty_forward(const Launcher& launch, Floats logprobs, Floats ref_logprobs, float* penalty,
                               int64_t count, const KlOptions& options) {
  const bool plain = count % kRun == 0 && all_plain({logprobs, ref_logprobs}, {});
  launch(plain ? kl_penalty_forward_kernel<true> : kl_penalty_forward_kernel<false>,
         divide_up(count, kElementThreads * kRun), kElementThreads, logprobs, ref_logprobs, penalty, count, options);
}

void launch_kl_penalty_backward(const Launcher& launch, const float* grad, Floats logprobs, Floats ref_logprobs,
                                FloatsOut grad_logprobs, FloatsOut grad_ref, int64_t count, const KlOptions& options) {
  const Floats upstream = {grad, Dtype::kFloat};
  const bool plain = count % kRun == 0 && all_plain({upstream, logprobs, ref_logprobs}, {});
  launch(plain ? kl_penalty_backward_kernel<true> : kl_penalty_backward_kernel<false>,
         divide_up(count, kElementThreads * kRun), kElementThreads, upstream, logprobs, ref_logprobs, grad_logprobs,
         grad_ref, count, options);
}

void launch_shaped_rewards(Launcher& launch, RewardBatch batch, float* rewards) {
  batch.valid = launch_valid(launch, batch.sequences);
  const int64_t tokens = batch.sequences.tokens;
  const bool plain = tokens % kRun == 0 && all_plain({batch.scores, batch.logprobs, batch.ref_logprobs}, {batch.mask});
  launch(plain ? shaped_rewards_kernel<true> : shaped_rewards_kernel<false>, divide_up(tokens, kRewardTokens),
         kRewardThreads, batch, rewards);
}

}  // namespace rlk
