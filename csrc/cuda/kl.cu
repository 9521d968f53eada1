#include <algorithm>
#include <initializer_list>

#include "kl.cuh"

namespace rlk {
namespace {

constexpr int kThreads = 256;
// More blocks than any GPU runs at once; the rest of a large tensor is taken by the same threads in turn.
constexpr int64_t kMaxBlocks = 4096;

bool all_aligned(std::initializer_list<const float*> arrays) {
  return std::all_of(arrays.begin(), arrays.end(),
                     [](const float* array) { return reinterpret_cast<uintptr_t>(array) % sizeof(float4) == 0; });
}

Elements elements_of(int64_t count, std::initializer_list<const float*> arrays) {
  return {count, all_aligned(arrays) ? count / 4 : 0};
}

int64_t blocks_for(const Elements& elements) {
  return std::min(kMaxBlocks, divide_up(elements.vectors > 0 ? elements.vectors : elements.count, kThreads));
}

}  // namespace

void launch_kl_penalty_forward(const Launcher& launch, const float* logprobs, const float* ref_logprobs, float* penalty,
                               int64_t count, const KlOptions& options) {
  const Elements elements = elements_of(count, {logprobs, ref_logprobs, penalty});
  launch(kl_penalty_forward_kernel, blocks_for(elements), kThreads, logprobs, ref_logprobs, penalty, elements, options);
}

void launch_kl_penalty_backward(const Launcher& launch, const float* grad, const float* logprobs,
                                const float* ref_logprobs, float* grad_logprobs, int64_t count,
                                const KlOptions& options) {
  const Elements elements = elements_of(count, {grad, logprobs, ref_logprobs, grad_logprobs});
  launch(kl_penalty_backward_kernel, blocks_for(elements), kThreads, grad, logprobs, ref_logprobs, grad_logprobs,
         elements, options);
}

void launch_shaped_rewards(const Launcher& launch, RewardBatch batch, float* rewards) {
  batch.aligned = all_aligned({batch.logprobs, batch.ref_logprobs, rewards}) &&
                  reinterpret_cast<uintptr_t>(batch.mask) % sizeof(uint32_t) == 0;
  launch(shaped_rewards_kernel, divide_up(batch.sequences.tokens, kRewardTokens), kRewardThreads, batch, rewards);
}

}  // namespace rlk
