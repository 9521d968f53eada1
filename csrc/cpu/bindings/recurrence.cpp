#include "cpu/recurrence.h"

#include "bindings.h"

namespace rlk {
namespace {

// Over all sequences, in their order.
AdvantageSums total(const std::vector<AdvantageSums>& sums) {
  AdvantageSums total = {};
  for (const AdvantageSums& sequence : sums) {
    total.count += sequence.count;
    total.sum += sequence.sum;
    total.squares += sequence.squares;
  }
  return total;
}

std::tuple<Tensor, Tensor> recurrence(Tensor rewards, std::optional<Tensor> values, std::optional<Tensor> logprobs,
                                      std::optional<Tensor> behavior_logprobs, std::optional<Tensor> mask,
                                      std::optional<Tensor> dones, std::optional<Tensor> cu_seqlens,
                                      std::optional<Tensor> bootstrap_values, int64_t kind, double gamma, double lam,
                                      double rho_clip, double c_clip, bool whiten) {
  Recurrence problem = {};
  problem.rewards = floats(rewards);
  problem.values = data_or_null<float>(values);
  problem.logprobs = data_or_null<float>(logprobs);
  problem.behavior_logprobs = data_or_null<float>(behavior_logprobs);
  problem.mask = data_or_null<bool>(mask);
  problem.dones = data_or_null<bool>(dones);
  problem.bootstrap_values = data_or_null<float>(bootstrap_values);
  problem.sequences = sequences_of(rewards, cu_seqlens);
  problem.kind = static_cast<int>(kind);
  problem.options = make_recurrence_options(problem.kind, gamma, lam, rho_clip, c_clip);

  const bool advantageous = has_advantages(problem.kind);
  Tensor advantages = advantageous ? empty_floats(rewards.sizes()) : empty_floats({0});
  Tensor returns = empty_floats(rewards.sizes());
  float* const advantage = advantageous ? advantages.mutable_data_ptr<float>() : nullptr;
  std::vector<AdvantageSums> sums(whiten ? problem.sequences.count : 0);
  with_kernels<RecurrenceKernels>([&](auto kernels) {
    parallel(problem.sequences.tokens, 1, [&](int64_t begin, int64_t end) {
      kernels.recurrence(problem, advantage, returns.mutable_data_ptr<float>(), whiten ? sums.data() : nullptr, begin,
                         end);
    });
    if (!whiten) return;
    const auto [count, sum, squares] = total(sums);
    if (count < 2) {
      std::fill_n(advantage, problem.sequences.tokens, 0.0f);
      return;
    }
    const AdvantageWhitening whitening = advantage_whitening(static_cast<double>(count), sum, squares);
    parallel(problem.sequences.tokens, 1,
             [&](int64_t begin, int64_t end) { kernels.whiten(problem, whitening, advantage, begin, end); });
  });
  return {advantages, returns};
}

}  // namespace
}  // namespace rlk

STABLE_TORCH_LIBRARY_IMPL(rlkernels, CPU, m) { m.impl("recurrence.cpu", TORCH_BOX(&rlk::recurrence)); }
