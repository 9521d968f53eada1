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

struct CpuRecurrence : Cpu {
  static void run(const Tensor&, const RecurrenceInputs<const float*, const bool*>& inputs, int kind,
                  const RecurrenceOptions& options, bool whiten, float* advantages, float* returns) {
    const Recurrence problem = {inputs, kind, options};
    std::vector<AdvantageSums> sums(whiten ? problem.sequences.count : 0);
    with_kernels<RecurrenceKernels>([&](auto kernels) {
      parallel(problem.sequences.tokens, 1, [&](int64_t begin, int64_t end) {
        kernels.recurrence(problem, advantages, returns, whiten ? sums.data() : nullptr, begin, end);
      });
      if (!whiten) return;
      const auto [count, sum, squares] = total(sums);
      if (count < 2) {
        std::fill_n(advantages, problem.sequences.tokens, 0.0f);
        return;
      }
      const AdvantageWhitening whitening = advantage_whitening(static_cast<double>(count), sum, squares);
      parallel(problem.sequences.tokens, 1,
               [&](int64_t begin, int64_t end) { kernels.whiten(problem, whitening, advantages, begin, end); });
    });
  }
};

}  // namespace
}  // namespace rlk

STABLE_TORCH_LIBRARY_IMPL(rlkernels, CPU, m) {
  m.impl("recurrence.cpu", TORCH_BOX(&rlk::recurrence<rlk::CpuRecurrence>));
}
