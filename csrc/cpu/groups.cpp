#include "rlkernels/groups.h"

#include <algorithm>
#include <vector>

#include "cpu/groups.h"

namespace rlk {
namespace {

constexpr float kNan = std::numeric_limits<float>::quiet_NaN();

struct Group {
  GroupStatistics statistics;
  bool differs;
};

// Describes scores[row(i)], i in [begin, end), without those that are NaN.
template <typename Row>
Group describe(const float* scores, int64_t begin, int64_t end, Row row) {
  float low = std::numeric_limits<float>::infinity(), high = -low;
  double size = 0.0, sum = 0.0, squares = 0.0;
  for (int64_t i = begin; i < end; ++i) {
    const float score = scores[row(i)];
    if (score != score) continue;
    low = std::min(low, score);
    high = std::max(high, score);
    size += 1.0;
    sum += score;
  }
  if (!(high > low)) return {{size, low, 0.0}, false};
  const double mean = sum / size;
  for (int64_t i = begin; i < end; ++i) {
    const double deviation = scores[row(i)] - mean;
    if (deviation == deviation) squares += deviation * deviation;
  }
  return {{size, mean, sample_std(squares, size)}, true};
}

// Advantages of one column of scores, NaN where the score is; marks the rows of groups whose scores differ.
void column_advantages(const GroupAdvantages& problem, const float* scores, float* advantages, bool* signal) {
  const auto in_group = [&](int64_t i) { return problem.order != nullptr ? problem.order[i] : i; };
  const auto in_batch = [](int64_t i) { return i; };
  Group batch = {};
  if (problem.options.scale == kScaleBatch) batch = describe(scores, 0, problem.rows, in_batch);
  for (int64_t begin = 0, end, g = 0; begin < problem.rows; begin = end, ++g) {
    end = problem.offsets != nullptr ? problem.offsets[g + 1] : begin + problem.group_size;
    const Group group = describe(scores, begin, end, in_group);
    const Group& spread = problem.options.scale == kScaleBatch ? batch : group;
    for (int64_t i = begin; i < end; ++i) {
      const int64_t row = in_group(i);
      advantages[row] = group_advantage(scores[row], group.statistics, spread.statistics, problem.options.baseline,
                                        problem.options.scale, problem.options.eps, problem.options.keep_singleton);
      if (scores[row] != scores[row]) advantages[row] = kNan;
      signal[row] |= group.differs;
    }
  }
}

}  // namespace

template <>
void GroupsKernels<Isa::RLK_ISA>::group_advantages(const GroupAdvantages& problem, float* advantages, bool* signal) {
  const int64_t rows = problem.rows, columns = problem.columns;
  std::vector<float> total(rows, 0.0f), column(rows), normalized(rows);
  std::vector<char> scored(rows, 0);
  std::fill_n(signal, rows, false);
  for (int64_t c = 0; c < columns; ++c) {
    for (int64_t row = 0; row < rows; ++row) column[row] = problem.rewards[row * columns + c];
    if (problem.options.normalize_before_sum) column_advantages(problem, column.data(), normalized.data(), signal);
    const std::vector<float>& summand = problem.options.normalize_before_sum ? normalized : column;
    const float weight = problem.weights != nullptr ? problem.weights[c] : 1.0f;
    for (int64_t row = 0; row < rows; ++row) {
      const float product = summand[row] * weight;
      if (product == product) total[row] += product;
      if (column[row] == column[row]) scored[row] = 1;
    }
  }
  for (int64_t row = 0; row < rows; ++row)
    if (!scored[row]) total[row] = kNan;

  if (problem.options.normalize_before_sum) {
    GroupAdvantages batch = problem;
    batch.order = batch.offsets = nullptr;
    batch.group_size = rows;
    batch.options.baseline = kBaselineMean;
    batch.options.scale = kScaleGroup;
    std::vector<char> unused(rows);
    column_advantages(batch, total.data(), advantages, reinterpret_cast<bool*>(unused.data()));
  } else {
    column_advantages(problem, total.data(), advantages, signal);
  }
  for (int64_t row = 0; row < rows; ++row) {
    if (advantages[row] != advantages[row]) advantages[row] = 0.0f;
    signal[row] = signal[row] && scored[row] != 0;
  }
}

}  // namespace rlk
