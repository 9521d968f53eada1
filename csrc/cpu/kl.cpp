#include "rlkernels/kl.h"

#include <algorithm>
#include <cstring>
#include <limits>
#include <type_traits>

#include "cpu/kl.h"
#include "simd.h"

namespace rlk {
namespace {

// Calls function with the estimator, and whether anything is clamped, as constants, so that no loop asks again.
template <typename Function>
void with_options(const KlOptions& options, Function function) {
  const auto with_estimator = [&](auto estimator) {
    const float least = std::min(options.log_ratio_clamp, options.value_clamp);
    if (least < std::numeric_limits<float>::infinity()) return function(estimator, std::true_type{});
    return function(estimator, std::false_type{});
  };
  switch (options.estimator) {
    case kK1:
      return with_estimator(std::integral_constant<int, kK1>{});
    case kK2:
      return with_estimator(std::integral_constant<int, kK2>{});
    case kK3:
      return with_estimator(std::integral_constant<int, kK3>{});
    default:
      return with_estimator(std::integral_constant<int, kAbs>{});
  }
}

// One past the last scored token of [begin, end), or begin. Rows may end with far more padding than they have tokens.
int64_t end_of_scored(const bool* mask, int64_t begin, int64_t end) {
  uint64_t tail;
  while (end - begin >= 8 && (std::memcpy(&tail, mask + end - 8, 8), tail == 0)) end -= 8;
  while (end > begin && !mask[end - 1]) --end;
  return end;
}

}  // namespace

template <>
void KlKernels<Isa::RLK_ISA>::kl_penalty_forward(const KlOptions& options, const float* logprobs,
                                                 const float* ref_logprobs, float* penalty, int64_t begin,
                                                 int64_t end) {
  const KlOptions o = options;
  with_options(o, [&](auto estimator, auto clamped) {
    for_each_vector(begin, end, [&](int64_t i, int64_t count) {
      const Vec p = load(logprobs + i, count), q = load(ref_logprobs + i, count);
      store(penalty + i,
            clamped ? kl_penalty(estimator, p, q, Vec(o.log_ratio_clamp), Vec(o.value_clamp))
                    : kl_estimate(estimator, p - q),
            count);
    });
  });
}

template <>
void KlKernels<Isa::RLK_ISA>::kl_penalty_backward(const KlOptions& options, const float* grad, const float* logprobs,
                                                  const float* ref_logprobs, float* grad_logprobs, int64_t begin,
                                                  int64_t end) {
  const KlOptions o = options;
  with_options(o, [&](auto estimator, auto clamped) {
    for_each_vector(begin, end, [&](int64_t i, int64_t count) {
      const Vec p = load(logprobs + i, count), q = load(ref_logprobs + i, count);
      const Vec derivative = clamped ? kl_penalty_derivative(estimator, o.straight_through, p, q,
                                                             Vec(o.log_ratio_clamp), Vec(o.value_clamp))
                                     : kl_estimate_derivative(estimator, o.straight_through, p - q);
      store(grad_logprobs + i, load(grad + i, count) * derivative, count);
    });
  });
}

template <>
void KlKernels<Isa::RLK_ISA>::shape_rewards(const ShapedRewards& problem, float* rewards, int64_t begin, int64_t end) {
  for_each_vector(begin, end, [&](int64_t i, int64_t count) {
    const Mask scored = problem.mask != nullptr ? load_mask(problem.mask + i, count) : first_lanes(count);
    const Vec reward = kl_reward(problem.estimator, load(problem.logprobs + i, count),
                                 load(problem.ref_logprobs + i, count), problem.kl_coef);
    store(rewards + i, select(scored, reward, Vec(0.0f)), count);
  });
}

template <>
void KlKernels<Isa::RLK_ISA>::add_scores(const ShapedRewards& problem, float* rewards, int64_t begin, int64_t end) {
  for (int64_t s = begin; s < end; ++s) {
    const int64_t first = problem.sequences.start(s), last = problem.sequences.start(s + 1);
    const int64_t scored = problem.mask != nullptr ? end_of_scored(problem.mask, first, last) : last;
    if (scored == first) continue;
    rewards[problem.after_last ? std::min(scored, last - 1) : scored - 1] += problem.scores[s];
  }
}

}  // namespace rlk
