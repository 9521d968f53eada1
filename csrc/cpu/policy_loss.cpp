#include "rlkernels/policy_loss.h"

#include <algorithm>

#include "cpu/policy_loss.h"
#include "simd.h"

namespace rlk {
namespace {

// Adds tokens [begin, end) of sequence s, whose advantage is `advantage` unless there is one per token.
void add_run(const PolicyLoss& problem, int64_t begin, int64_t end, int64_t s, float divisor, PolicySums& sums,
             float* gradient) {
  Sum loss, metrics[kNumTokens];
  const float* old_logprobs = problem.old_logprobs != nullptr ? problem.old_logprobs : problem.logprobs;
  const float* ref_logprobs = problem.ref_logprobs != nullptr ? problem.ref_logprobs : problem.logprobs;
  const Vec zero = 0.0f;
  for_each_vector(begin, end, [&](int64_t i, int64_t count) {
    const Mask scored = problem.mask != nullptr ? load_mask(problem.mask + i, count) : first_lanes(count);
    // What is not scored may hold anything, so it is replaced before any arithmetic.
    const auto scored_only = [&](Vec x) { return select(scored, x, zero); };
    const Vec advantage =
        problem.advantage_per_token ? load(problem.advantages + i, count) : Vec(problem.advantages[s]);
    const TokenLoss<Vec> token = policy_token_loss(problem.options, scored_only(load(problem.logprobs + i, count)),
                                                   scored_only(load(old_logprobs + i, count)),
                                                   scored_only(load(ref_logprobs + i, count)), scored_only(advantage));
    loss += scored_only(token.loss);
    metrics[kRatioMean] += scored_only(token.ratio);
    metrics[kClipLow] += scored_only(token.clipped_low);
    metrics[kClipHigh] += scored_only(token.clipped_high);
    metrics[kApproxKl] += scored_only(token.approx_kl);
    metrics[kRefKl] += scored_only(token.ref_kl);
    store(gradient + i, scored_only(token.derivative / Vec(divisor)), count);
  });
  sums.loss += loss.total() / divisor;
  for (int k = 0; k < kNumTokens; ++k) sums.metrics[k] += metrics[k].total();
}

}  // namespace

template <>
void PolicyLossKernels<Isa::RLK_ISA>::policy_loss_lengths(const PolicyLoss& problem, int64_t* lengths, int64_t begin,
                                                          int64_t end) {
  for (int64_t s = begin; s < end; ++s) {
    const int64_t first = problem.sequences.start(s), last = problem.sequences.start(s + 1);
    lengths[s] = problem.mask != nullptr ? std::count(problem.mask + first, problem.mask + last, true) : last - first;
  }
}

template <>
void PolicyLossKernels<Isa::RLK_ISA>::policy_loss_sums(const PolicyLoss& problem, const int64_t* lengths,
                                                       PolicySums* sums, float* gradient, int64_t begin, int64_t end) {
  for (int64_t block = begin; block < end; ++block) {
    PolicySums block_sums = {};
    const int64_t last = std::min(problem.sequences.tokens, (block + 1) * PolicyLoss::kBlock);
    int64_t token = block * PolicyLoss::kBlock;
    for (int64_t s = problem.sequences.of(token); token < last; ++s) {
      const int64_t run_end = std::min(last, problem.sequences.start(s + 1));
      const float divisor = problem.mean_over_sequence ? std::max<int64_t>(lengths[s], 1) : 1;
      add_run(problem, token, run_end, s, divisor, block_sums, gradient);
      token = run_end;
    }
    sums[block] = block_sums;
  }
}

}  // namespace rlk
