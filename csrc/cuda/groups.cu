#include <algorithm>

#include "groups.cuh"
#include "launch.h"

namespace rlk {
namespace {

constexpr int64_t kMaxThreads = kWarp * kMaxWarps;

int block_threads(int64_t group_size) {
  return static_cast<int>(std::clamp<int64_t>(divide_up(group_size, kWarp) * kWarp, kWarp, kMaxThreads));
}

// The sizes of ragged groups are known to the device alone. Few have more rows than this; more take turns.
constexpr int kRaggedGroupThreads = 64;

std::tuple<Tensor, Tensor> group_advantages(Tensor rewards, std::optional<Tensor> weights, std::optional<Tensor> order,
                                            std::optional<Tensor> offsets, int64_t group_size, int64_t baseline,
                                            int64_t scale, double eps, bool normalize_before_sum, bool keep_singleton) {
  const Launcher launch(rewards);
  const int64_t rows = rewards.size(0), kinds = rewards.size(1), columns = normalize_before_sum ? kinds : 1;
  const Scores scores = {floats(rewards), data_or_null<float>(weights), kinds, !normalize_before_sum};
  const Groups groups = {data_or_null<int64_t>(order), data_or_null<int64_t>(offsets), group_size};
  const int64_t group_count = offsets ? rows : rows / group_size;
  const float epsilon = static_cast<float>(eps);
  Tensor advantages = empty_like(rewards, {rows}), signal = empty_like(rewards, {rows}, ScalarType::Bool);
  float* const advantages_out = advantages.mutable_data_ptr<float>();
  bool* const signal_out = signal.mutable_data_ptr<bool>();
  if (rows == 0) return {advantages, signal};

  const auto advantages_by_group = [&](float* out, bool* out_signal) {
    std::optional<Tensor> batch;
    GroupStatistics<float>* statistics = nullptr;
    if (scale == kScaleBatch) {
      batch = empty_like(rewards, {columns, sizeof(GroupStatistics<float>) / sizeof(float)});
      statistics = static_cast<GroupStatistics<float>*>(batch->data_ptr());
      launch(batch_statistics_kernel, columns, block_threads(rows), scores, rows, statistics);
    }
    launch(group_advantages_kernel, group_count * columns, offsets ? kRaggedGroupThreads : block_threads(group_size),
           scores, groups, columns, statistics, static_cast<int>(baseline), static_cast<int>(scale), epsilon,
           keep_singleton, out, out_signal);
  };

  if (!normalize_before_sum) {
    advantages_by_group(advantages_out, signal_out);
    return {advantages, signal};
  }
  Tensor each = empty_like(rewards, {rows, kinds}), signals = empty_like(rewards, {rows, kinds}, ScalarType::Bool);
  Tensor total = empty_like(rewards, {rows});
  advantages_by_group(each.mutable_data_ptr<float>(), signals.mutable_data_ptr<bool>());
  launch(sum_advantages_kernel, divide_up(rows, kMaxThreads), static_cast<int>(kMaxThreads), scores, rows, floats(each),
         signals.const_data_ptr<bool>(), total.mutable_data_ptr<float>(), signal_out);
  launch(group_advantages_kernel, 1, block_threads(rows), Scores{floats(total), nullptr, 1, false},
         Groups{nullptr, nullptr, rows}, 1, nullptr, static_cast<int>(kBaselineMean), static_cast<int>(kScaleGroup),
         epsilon, keep_singleton, advantages_out, nullptr);
  return {advantages, signal};
}

}  // namespace
}  // namespace rlk

STABLE_TORCH_LIBRARY_IMPL(rlkernels, RLK_CUDA_KEY, m) {
  m.impl("group_advantages.cuda", TORCH_BOX(&rlk::group_advantages));
}
