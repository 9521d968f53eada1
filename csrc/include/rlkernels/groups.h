// group_advantages: one score relative to its group.
#pragma once

#include <cstdint>

#include "rlkernels/math.h"

namespace rlk {

enum GroupBaseline { kBaselineMean = 0, kBaselineLeaveOneOut = 1, kBaselineNone = 2 };
enum GroupScale { kScaleGroup = 0, kScaleBatch = 1, kScaleNone = 2 };

struct GroupOptions {
  int baseline, scale;
  float eps;
  bool normalize_before_sum, keep_singleton;
};

inline GroupOptions make_group_options(int64_t baseline, int64_t scale, double eps, bool normalize_before_sum,
                                       bool keep_singleton) {
  return {static_cast<int>(baseline), static_cast<int>(scale), static_cast<float>(eps), normalize_before_sum,
          keep_singleton};
}

// They describe the scores of a group that are not NaN. Where these do not differ, mean is that score and std is 0,
// exactly. All is in double, in which the square of no float overflows or is 0.
struct GroupStatistics {
  double size, mean, std;
};

// sample standard deviation from the sum of squared deviations
RLK_HD double sample_std(double squares, double size) { return sqrt(squares / (size - 1.0)); }

// (score - baseline) / (std + eps). The mean of the others is score - (score - mean) * n / (n - 1). A score alone has
// no standard deviation, and is scaled as if it were 1. `spread` are the statistics of what scales: the group or the
// batch.
RLK_HD float group_advantage(float score, GroupStatistics group, GroupStatistics spread, int baseline, int scale,
                             float eps, bool keep_singleton) {
  double advantage = score;
  if (baseline != kBaselineNone) {
    advantage = score - group.mean;
    if (baseline == kBaselineLeaveOneOut) {
      advantage = advantage * (group.size / select(group.size > 2.0, group.size - 1.0, 1.0));
    }
    advantage = select(group.size == 1.0, keep_singleton ? score : 0.0, advantage);
  }
  if (scale != kScaleNone) advantage = advantage / (select(spread.size > 1.0, spread.std, 1.0) + eps);
  return static_cast<float>(advantage);
}

}  // namespace rlk
