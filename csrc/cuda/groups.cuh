// group_advantages: a block per group and column of scores.
#pragma once

#include "groups.h"
#include "inputs.cuh"
#include "rlkernels/groups.h"

namespace rlk {

__device__ inline int64_t id_of(const GroupIds& ids, int row) {
  switch (ids.dtype) {
    case Dtype::kInt64:
      return static_cast<const int64_t*>(ids.data)[row];
    case Dtype::kInt32:
      return static_cast<const int32_t*>(ids.data)[row];
    case Dtype::kInt16:
      return static_cast<const int16_t*>(ids.data)[row];
    case Dtype::kInt8:
      return static_cast<const int8_t*>(ids.data)[row];
    default:
      return static_cast<const uint8_t*>(ids.data)[row];
  }
}

constexpr int kPlaceThreads = 128;

// A thread per row: where it is once rows are sorted by group, which is behind those of smaller ids, and behind the
// earlier ones of the same; and whether a group starts there.
__global__ void __launch_bounds__(kPlaceThreads)
    group_places_kernel(GroupIds ids, int count, int64_t* order, uint8_t* starts) {
  __shared__ int64_t others[kPlaceThreads];
  const int row = static_cast<int>(blockIdx.x) * kPlaceThreads + static_cast<int>(threadIdx.x);
  const int64_t own = row < count ? id_of(ids, row) : 0;
  int less = 0, before = 0;
  for (int first = 0; first < count; first += kPlaceThreads) {
    const int other = first + static_cast<int>(threadIdx.x);
    if (other < count) others[threadIdx.x] = id_of(ids, other);
    __syncthreads();
    for (int i = 0; i < kPlaceThreads && first + i < count; ++i) {
      less += others[i] < own;
      before += others[i] == own && first + i < row;
    }
    // The next ids are written where slower threads still read.
    __syncthreads();
  }
  if (row >= count) return;
  order[less + before] = row;
  starts[less + before] = before == 0;
}

// One warp: the places where groups start, one after the other, and then `count`, for groups without rows.
__global__ void __launch_bounds__(kWarp) group_offsets_kernel(const uint8_t* starts, int count, int64_t* offsets) {
  const int lane = static_cast<int>(threadIdx.x);
  int groups = 0;
  for (int first = 0; first < count; first += kWarp) {
    const int place = first + lane;
    const bool start = place < count && starts[place] != 0;
    const unsigned lanes = __ballot_sync(0xffffffffu, start);
    if (start) offsets[groups + __popc(lanes & ((1u << lane) - 1))] = place;
    groups += __popc(lanes);
  }
  for (int group = groups + lane; group <= count; group += kWarp) offsets[group] = count;
}

__global__ void numbers_kernel(Numbers numbers, float* result) {
  if (threadIdx.x < static_cast<unsigned>(numbers.count)) result[threadIdx.x] = numbers.values[threadIdx.x];
}

// The columns whose groups are compared: each reward on its own, or their weighted sum alone.
struct Scores {
  Floats rewards;  // [rows, kinds]
  Floats weights;  // [kinds], or null: all 1
  int64_t kinds;
  bool summed;

  __device__ bool any(int64_t row) const {
    for (int64_t r = 0; r < kinds; ++r)
      if (!isnan(element<false>(rewards, row * kinds + r))) return true;
    return false;
  }
  // A row's sum over `values` [rows, kinds], such as the rewards; NaN where no reward applied to the row.
  __device__ float sum(Floats values, int64_t row) const {
    if (!any(row)) return kNan;
    float total = 0.0f;
    for (int64_t r = 0; r < kinds; ++r) {
      const float weight = weights.data != nullptr ? element<false>(weights, r) : 1.0f;
      const float value = product(element<false>(values, row * kinds + r), weight);
      if (!isnan(value)) total += value;
    }
    return total;
  }
  __device__ float at(int64_t row, int64_t column) const {
    return summed ? sum(rewards, row) : element<false>(rewards, row * kinds + column);
  }
};

struct ScoreRange {
  double size, sum;
  float low, high;
};

struct GroupSummary {
  GroupStatistics statistics;
  bool differs;
};

// Describes the scores at positions [begin, end) that are not NaN, the same for every thread. The sums are in double,
// because the difference of a score and its mean follows.
__device__ inline GroupSummary describe(const Scores& scores, const Groups& groups, int64_t column, int64_t begin,
                                        int64_t end) {
  ScoreRange range = {0.0, 0.0, kInfinity, -kInfinity};
  for (int64_t i = begin + threadIdx.x; i < end; i += blockDim.x) {
    const float score = scores.at(groups.row(i), column);
    if (isnan(score)) continue;
    range = {range.size + 1.0, range.sum + score, fminf(range.low, score), fmaxf(range.high, score)};
  }
  range = block_reduce(range, [](const ScoreRange& a, const ScoreRange& b) {
    return ScoreRange{a.size + b.size, a.sum + b.sum, fminf(a.low, b.low), fmaxf(a.high, b.high)};
  });
  if (!(range.high > range.low)) return {{range.size, range.low, 0.0}, false};

  const double mean = range.sum / range.size;
  double squares = 0.0;
  for (int64_t i = begin + threadIdx.x; i < end; i += blockDim.x) {
    const double deviation = scores.at(groups.row(i), column) - mean;
    if (!isnan(deviation)) squares += deviation * deviation;
  }
  squares = block_reduce(squares, [](double a, double b) { return a + b; });
  return {{range.size, mean, sample_std(squares, range.size)}, true};
}

// Block c: of all scores of column c.
__global__ void batch_statistics_kernel(Scores scores, int64_t rows, GroupStatistics* statistics) {
  const GroupSummary batch = describe(scores, Groups{nullptr, nullptr, rows, 1}, blockIdx.x, 0, rows);
  if (threadIdx.x == 0) statistics[blockIdx.x] = batch.statistics;
}

// Block g * columns + c: advantages [rows, columns] of group g in column c, 0 where the score is NaN; and, unless null,
// signal [rows, columns]: the group's scores differ, and the row has one. batch_statistics is null where the group
// scales.
__global__ void group_advantages_kernel(Scores scores, Groups groups, int64_t columns,
                                        const GroupStatistics* batch_statistics, int baseline, int scale, float eps,
                                        bool keep_singleton, float* advantages, bool* signal) {
  const int64_t g = blockIdx.x / columns, column = blockIdx.x % columns;
  const int64_t begin = groups.begin(g), end = groups.begin(g + 1);
  if (begin == end) return;
  const GroupSummary group = describe(scores, groups, column, begin, end);
  const GroupStatistics spread = batch_statistics != nullptr ? batch_statistics[column] : group.statistics;
  for (int64_t i = begin + threadIdx.x; i < end; i += blockDim.x) {
    const int64_t row = groups.row(i);
    const float advantage =
        group_advantage(scores.at(row, column), group.statistics, spread, baseline, scale, eps, keep_singleton);
    advantages[row * columns + column] = isnan(advantage) ? 0.0f : advantage;
    if (signal != nullptr) signal[row * columns + column] = group.differs && scores.any(row);
  }
}

// The weighted sum of the advantages of each reward, and whether any of them has a signal. A thread per row.
__global__ void sum_advantages_kernel(Scores scores, int64_t rows, const float* advantages, const bool* signals,
                                      float* total, bool* signal) {
  const int64_t row = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  if (row >= rows) return;
  total[row] = scores.sum({advantages, Dtype::kFloat}, row);
  bool any = false;
  for (int64_t r = 0; r < scores.kinds; ++r) any = any || signals[row * scores.kinds + r];
  signal[row] = any;
}

}  // namespace rlk
