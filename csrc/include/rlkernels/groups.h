// group_advantages: one score relative to its group.
#pragma once

#include "rlkernels/math.h"

namespace rlk {

enum GroupBaseline { kBaselineMean = 0, kBaselineLeaveOneOut = 1, kBaselineNone = 2 };
enum GroupScale { kScaleGroup = 0, kScaleBatch = 1, kScaleNone = 2 };

// Of the scores of a group that are not NaN. Where they do not differ, mean is that score and std is 0, exactly.
template <class F>
struct GroupStatistics {
  F size, mean, std;
};

// sample standard deviation from the sum of squared deviations
template <class F>
RLK_HD F sample_std(F squares, F size) {
  return sqrt(squares / (size - F(1)));
}

// (score - baseline) / (std + eps). The mean of the others is score - (score - mean) * n / (n - 1). A score alone has
// no standard deviation, and is scaled as if it were 1. `spread` are the statistics of what scales: the group or the
// batch.
template <class F>
RLK_HD F group_advantage(F score, GroupStatistics<F> group, GroupStatistics<F> spread, int baseline, int scale, F eps,
                         bool keep_singleton) {
  F advantage = score;
  if (baseline != kBaselineNone) {
    advantage = score - group.mean;
    if (baseline == kBaselineLeaveOneOut) {
      advantage = advantage * (group.size / select(group.size > F(2), group.size - F(1), F(1)));
    }
    advantage = select(group.size == F(1), keep_singleton ? score : F(0), advantage);
  }
  if (scale == kScaleNone) return advantage;
  return advantage / (select(spread.size > F(1), spread.std, F(1)) + eps);
}

}  // namespace rlk
