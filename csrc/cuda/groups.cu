#include <algorithm>

#include "groups.cuh"

namespace rlk {
namespace {

constexpr int64_t kMaxThreads = kWarp * kMaxWarps;

int block_threads(int64_t group_size) {
  return static_cast<int>(std::clamp<int64_t>(divide_up(group_size, kWarp) * kWarp, kWarp, kMaxThreads));
}

// The sizes of ragged groups are known to the device alone. Few have more rows than this; more take turns.
constexpr int kRaggedGroupThreads = 64;

}  // namespace

void launch_group_segments(Launcher& launch, const GroupIds& ids, int count, int64_t* order, int64_t* offsets) {
  uint8_t* const starts = launch.room_for<uint8_t>(count);
  launch(group_places_kernel, divide_up(count, kPlaceThreads), kPlaceThreads, ids, count, order, starts);
  launch(group_offsets_kernel, 1, static_cast<int>(kWarp), starts, count, offsets);
}

void launch_numbers_on_device(Launcher& launch, const Numbers& numbers, float* result) {
  launch(numbers_kernel, 1, kArguments, numbers, result);
}

void launch_group_advantages(Launcher& launch, Floats rewards, Floats weights, int64_t rows, int64_t kinds,
                             const Groups& groups, const GroupOptions& options, float* advantages, bool* signal) {
  if (rows == 0) return;
  const Scores scores = {rewards, weights, kinds, !options.normalize_before_sum};
  const int64_t columns = options.normalize_before_sum ? kinds : 1;

  const auto advantages_by_group = [&](float* out, bool* out_signal) {
    GroupStatistics* statistics = nullptr;
    if (options.scale == kScaleBatch) {
      statistics = launch.room_for<GroupStatistics>(columns);
      launch(batch_statistics_kernel, columns, block_threads(rows), scores, rows, statistics);
    }
    launch(group_advantages_kernel, groups.count * columns,
           groups.offsets != nullptr ? kRaggedGroupThreads : block_threads(groups.group_size), scores, groups, columns,
           statistics, options.baseline, options.scale, options.eps, options.keep_singleton, out, out_signal);
  };

  if (!options.normalize_before_sum) return advantages_by_group(advantages, signal);
  float *const each = launch.room_for<float>(rows * kinds), *const total = launch.room_for<float>(rows);
  bool* const signals = launch.room_for<bool>(rows * kinds);
  advantages_by_group(each, signals);
  launch(sum_advantages_kernel, divide_up(rows, kMaxThreads), static_cast<int>(kMaxThreads), scores, rows, each,
         signals, total, signal);
  launch(group_advantages_kernel, 1, block_threads(rows), Scores{{total, Dtype::kFloat}, {}, 1, false},
         Groups{nullptr, nullptr, rows, 1}, 1, nullptr, static_cast<int>(kBaselineMean), static_cast<int>(kScaleGroup),
         options.eps, options.keep_singleton, advantages, nullptr);
}

}  // namespace rlk
