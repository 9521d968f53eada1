#include "rlkernels/masked.h"

#include "cpu/masked.h"
#include "simd.h"

namespace rlk {
namespace {

// Calls function(x, scored) for every vector of elements [begin, end); x is `unscored` where it is not scored.
template <typename Function>
void for_each_scored(const Masked& problem, int64_t begin, int64_t end, Vec unscored, Function function) {
  for_each_vector(begin, end, [&](int64_t i, int64_t count) {
    const Mask scored = problem.mask != nullptr ? load_mask(problem.mask + i, count) : first_lanes(count);
    function(select(scored, load(problem.x + i, count), unscored), scored);
  });
}

}  // namespace

template <>
void MaskedKernels<Isa::RLK_ISA>::masked_sums(const Masked& problem, MaskedSum* sums, int64_t begin, int64_t end) {
  for (int64_t b = begin; b < end; ++b) {
    Sum sum;
    Vec count = 0.0f;
    for_each_scored(problem, problem.begin(b), problem.end(b), 0.0f, [&](Vec x, Mask scored) {
      sum += x;
      count += select(scored, Vec(1.0f), Vec(0.0f));
    });
    sums[b] = {horizontal_sum(count), sum.total()};
  }
}

template <>
void MaskedKernels<Isa::RLK_ISA>::masked_moments(const Masked& problem, Moments* moments, int64_t begin, int64_t end) {
  for (int64_t b = begin; b < end; ++b) {
    const int64_t first = problem.begin(b), last = problem.end(b);
    Sum sum;
    Vec count = 0.0f;
    for_each_scored(problem, first, last, 0.0f, [&](Vec x, Mask scored) {
      sum += x;
      count += select(scored, Vec(1.0f), Vec(0.0f));
    });
    // The block is in the cache by now.
    const float scored_count = horizontal_sum(count);
    const float centre = scored_count > 0.0f ? static_cast<float>(sum.total() / scored_count) : 0.0f;
    Sum deviations, squares;
    for_each_scored(problem, first, last, centre, [&](Vec x, Mask) {
      deviations.add(x, [&](Sum::Doubles wide) { return wide - double{centre}; });
      squares.add(x, [&](Sum::Doubles wide) { return (wide - double{centre}) * (wide - double{centre}); });
    });
    moments[b] = moments_of(scored_count, centre, deviations.total(), squares.total());
  }
}

template <>
void MaskedKernels<Isa::RLK_ISA>::masked_whiten(const Masked& problem, const Whitening& whitening, float* whitened,
                                                int64_t begin, int64_t end) {
  for_each_vector(begin, end, [&](int64_t i, int64_t count) {
    const Mask scored = problem.mask != nullptr ? load_mask(problem.mask + i, count) : first_lanes(count);
    store(whitened + i, select(scored, whiten(whitening, load(problem.x + i, count)), Vec(0.0f)), count);
  });
}

}  // namespace rlk
