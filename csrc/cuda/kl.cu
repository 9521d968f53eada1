#include <algorithm>
#include <initializer_list>

#include "kl.cuh"
#include "launch.h"

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

KlOptions kl_options(int64_t estimator, bool straight_through, double log_ratio_clamp, double value_clamp) {
  return {static_cast<int>(estimator), straight_through, static_cast<float>(log_ratio_clamp),
          static_cast<float>(value_clamp)};
}

Tensor kl_penalty_forward(Tensor logprobs, Tensor ref_logprobs, int64_t estimator, bool straight_through,
                          double log_ratio_clamp, double value_clamp) {
  const Launcher launch(logprobs);
  Tensor penalty = empty_like(logprobs, logprobs.sizes());
  float* const out = penalty.mutable_data_ptr<float>();
  const Elements elements = elements_of(logprobs.numel(), {floats(logprobs), floats(ref_logprobs), out});
  launch(kl_penalty_forward_kernel, blocks_for(elements), kThreads, floats(logprobs), floats(ref_logprobs), out,
         elements, kl_options(estimator, straight_through, log_ratio_clamp, value_clamp));
  return penalty;
}

Tensor kl_penalty_backward(Tensor grad, Tensor logprobs, Tensor ref_logprobs, int64_t estimator, bool straight_through,
                           double log_ratio_clamp, double value_clamp) {
  const Launcher launch(logprobs);
  Tensor grad_logprobs = empty_like(logprobs, logprobs.sizes());
  float* const out = grad_logprobs.mutable_data_ptr<float>();
  const Elements elements = elements_of(logprobs.numel(), {floats(grad), floats(logprobs), floats(ref_logprobs), out});
  launch(kl_penalty_backward_kernel, blocks_for(elements), kThreads, floats(grad), floats(logprobs),
         floats(ref_logprobs), out, elements, kl_options(estimator, straight_through, log_ratio_clamp, value_clamp));
  return grad_logprobs;
}

Tensor shaped_rewards(Tensor scores, Tensor logprobs, Tensor ref_logprobs, std::optional<Tensor> mask,
                      std::optional<Tensor> cu_seqlens, std::optional<Tensor> valid, double kl_coef, int64_t estimator,
                      bool after_last) {
  const Launcher launch(logprobs);
  Tensor rewards = empty_like(logprobs, logprobs.sizes());
  float* const out = rewards.mutable_data_ptr<float>();
  RewardBatch batch = {};
  batch.scores = floats(scores);
  batch.logprobs = floats(logprobs);
  batch.ref_logprobs = floats(ref_logprobs);
  batch.mask = data_or_null<bool>(mask);
  batch.valid = data_or_null<float>(valid);
  batch.sequences = sequences_of(logprobs, cu_seqlens);
  batch.estimator = static_cast<int>(estimator);
  batch.kl_coef = static_cast<float>(kl_coef);
  batch.after_last = after_last;
  batch.aligned = all_aligned({batch.logprobs, batch.ref_logprobs, out}) &&
                  reinterpret_cast<uintptr_t>(batch.mask) % sizeof(uint32_t) == 0;
  launch(shaped_rewards_kernel, divide_up(batch.sequences.tokens, kRewardTokens), kRewardThreads, batch, out);
  return rewards;
}

}  // namespace
}  // namespace rlk

STABLE_TORCH_LIBRARY_IMPL(rlkernels, RLK_CUDA_KEY, m) {
  m.impl("kl_penalty_forward.cuda", TORCH_BOX(&rlk::kl_penalty_forward));
  m.impl("kl_penalty_backward.cuda", TORCH_BOX(&rlk::kl_penalty_backward));
  m.impl("shaped_rewards.cuda", TORCH_BOX(&rlk::shaped_rewards));
}
