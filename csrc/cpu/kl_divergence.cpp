#include "rlkernels/kl_divergence.h"

#include <algorithm>
#include <cstring>

#include "cpu/kl_divergence.h"
#include "logit_rows.h"
#include "rlkernels/logprobs.h"

namespace rlk {
namespace {

// One row of a model: log p = (y - largest) / temperature - log_sum, of the capped logits y.
struct Row {
  float largest, log_sum, inverse_temperature, softcap;

  Row(const Distribution& model, int64_t row)
      : largest(model.row_stats[row]),
        log_sum(model.row_stats[model.logits.rows + row]),
        inverse_temperature(1.0f / model.temperature),
        softcap(model.softcap) {}

  Vec below_largest(Vec x) const { return scaled_logit(x, Vec(softcap), Vec(1.0f), softcap > 0) - Vec(largest); }
  Vec log_p(Vec below) const { return below * Vec(inverse_temperature) - Vec(log_sum); }
};

// The logarithms of nearly equal probabilities would each be rounded: their difference is that of the logits, less that
// of the sums.
TokenPair<Vec> pair_of(const Row& student, const Row& teacher, Vec student_x, Vec teacher_x) {
  const Vec s = student.below_largest(student_x), t = teacher.below_largest(teacher_x);
  const Vec ratio = teacher.inverse_temperature / student.inverse_temperature;
  const Vec d = (t * ratio - s) * Vec(student.inverse_temperature) - Vec(teacher.log_sum - student.log_sum);
  return token_pair(student.log_p(s), teacher.log_p(t), d);
}

template <int kKind, typename S, typename T>
DivergenceSums block_sums(const S* x, const T* teacher_x, int64_t size, const KlDivergence& problem, const Row& student,
                          const Row& teacher) {
  Sum divergence, moment, total;
  for_each_vector(0, size, [&](int64_t i, int64_t count) {
    const TokenPair<Vec> pair = pair_of(student, teacher, load(x + i, count), load(teacher_x + i, count));
    DivergenceTerm<Vec> term = divergence_term(kKind, pair, Vec(problem.beta), Vec(problem.one_minus_beta));
    if (count < kLanes) {
      const Mask inside = first_lanes(count);
      term = {select(inside, term.divergence, Vec(0.0f)), select(inside, term.moment, Vec(0.0f)),
              select(inside, term.total, Vec(0.0f))};
    }
    divergence += term.divergence;
    moment += term.moment;
    total += term.total;
  });
  return {divergence.total(), moment.total(), total.total()};
}

template <int kKind, typename S, typename T>
void block_gradient(const S* x, const T* teacher_x, S* gradient, int64_t size, const KlDivergence& problem,
                    const Row& student, const Row& teacher, float grad, float centre) {
  const Vec scale = grad * student.inverse_temperature;
  for_each_vector(0, size, [&](int64_t i, int64_t count) {
    const Vec logits = load(x + i, count);
    const TokenPair<Vec> pair = pair_of(student, teacher, logits, load(teacher_x + i, count));
    const Vec dz = divergence_gradient(kKind, pair, Vec(centre), Vec(problem.beta), Vec(problem.one_minus_beta));
    const Vec dy = scaled_logit_derivative(logits, Vec(student.softcap), Vec(1.0f), student.softcap > 0);
    store(gradient + i, scale * dz * dy, count);
  });
}

template <typename Function>
void with_kind(int kind, Function function) {
  switch (kind) {
    case kForward:
      return function(std::integral_constant<int, kForward>{});
    case kReverse:
      return function(std::integral_constant<int, kReverse>{});
    default:
      return function(std::integral_constant<int, kJensenShannon>{});
  }
}

// Calls function(kind, row, student's logits, teacher's, start, size) for blocks [begin, end).
template <typename Function>
void for_each_block(const KlDivergence& problem, int64_t begin, int64_t end, Function function) {
  const LogitRows &student = problem.student.logits, &teacher = problem.teacher.logits;
  with_kind(problem.kind, [&](auto kind) {
    with_element_type(student.dtype, [&]<typename S>(S) {
      with_element_type(teacher.dtype, [&]<typename T>(T) {
        for (int64_t i = begin; i < end; ++i) {
          const int64_t row = i / problem.blocks_per_row();
          const int64_t start = i % problem.blocks_per_row() * KlDivergence::kBlock;
          const int64_t size = std::min(KlDivergence::kBlock, student.vocab - start);
          function(kind, i, row, row_start<const S>(student, row) + start, row_start<const T>(teacher, row) + start,
                   start, size);
        }
      });
    });
  });
}

}  // namespace

template <>
void KlDivergenceKernels<Isa::RLK_ISA>::kl_divergence_sums(const KlDivergence& problem, DivergenceSums* sums,
                                                           int64_t begin, int64_t end) {
  const FlushDenormals flush;
  for_each_block(problem, begin, end,
                 [&](auto kind, int64_t i, int64_t row, const auto* x, const auto* teacher_x, int64_t, int64_t size) {
                   sums[i] = block_sums<kind>(x, teacher_x, size, problem, Row(problem.student, row),
                                              Row(problem.teacher, row));
                 });
}

template <>
void KlDivergenceKernels<Isa::RLK_ISA>::kl_divergence_backward(const KlDivergence& problem, const float* grad,
                                                               const float* centre, const LogitRows& gradient,
                                                               int64_t begin, int64_t end) {
  const FlushDenormals flush;
  for_each_block(
      problem, begin, end,
      [&]<typename S>(auto kind, int64_t, int64_t row, const S* x, const auto* teacher_x, int64_t start, int64_t size) {
        S* const out = row_start<S>(gradient, row) + start;
        if (grad[row] == 0.0f) {
          std::memset(out, 0, size * sizeof(S));
          return;
        }
        block_gradient<kind>(x, teacher_x, out, size, problem, Row(problem.student, row), Row(problem.teacher, row),
                             grad[row], centre[row]);
      });
}

}  // namespace rlk
