#include "rlkernels/kl.h"

#include <type_traits>

#include "cpu/kl.h"
#include "simd.h"

namespace rlk {
namespace {

// Calls function with the estimator as a constant, so that no loop asks again which one it is.
template <typename Function>
void with_estimator(int estimator, Function function) {
  switch (estimator) {
    case kK1:
      return function(std::integral_constant<int, kK1>{});
    case kK2:
      return function(std::integral_constant<int, kK2>{});
    case kK3:
      return function(std::integral_constant<int, kK3>{});
    default:
      return function(std::integral_constant<int, kAbs>{});
  }
}

}  // namespace

template <>
void KlKernels<Isa::RLK_ISA>::kl_penalty_forward(const KlPenalty& options, const float* logprobs,
                                                 const float* ref_logprobs, float* penalty, int64_t begin,
                                                 int64_t end) {
  with_estimator(options.estimator, [&](auto estimator) {
    for_each_vector(begin, end, [&](int64_t i, int64_t count) {
      store(penalty + i,
            kl_penalty(estimator, load(logprobs + i, count), load(ref_logprobs + i, count),
                       Vec(options.log_ratio_clamp), Vec(options.value_clamp)),
            count);
    });
  });
}

template <>
void KlKernels<Isa::RLK_ISA>::kl_penalty_backward(const KlPenalty& options, const float* grad, const float* logprobs,
                                                  const float* ref_logprobs, float* grad_logprobs, int64_t begin,
                                                  int64_t end) {
  with_estimator(options.estimator, [&](auto estimator) {
    for_each_vector(begin, end, [&](int64_t i, int64_t count) {
      const Vec derivative =
          kl_penalty_derivative(estimator, options.straight_through, load(logprobs + i, count),
                                load(ref_logprobs + i, count), Vec(options.log_ratio_clamp), Vec(options.value_clamp));
      store(grad_logprobs + i, load(grad + i, count) * derivative, count);
    });
  });
}

}  // namespace rlk
