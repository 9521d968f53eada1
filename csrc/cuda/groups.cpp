#include "groups.h"

#include "tensors.h"

namespace rlk {
namespace {

std::tuple<Tensor, Tensor> group_advantages(Tensor rewards, std::optional<Tensor> weights, std::optional<Tensor> order,
                                            std::optional<Tensor> offsets, int64_t group_size, int64_t baseline,
                                            int64_t scale, double eps, bool normalize_before_sum, bool keep_singleton) {
  const int64_t rows = rewards.size(0);
  const Groups groups = {data_or_null<int64_t>(order), data_or_null<int64_t>(offsets), group_size,
                         offsets ? rows : rows / group_size};
  const GroupOptions options = make_group_options(baseline, scale, eps, normalize_before_sum, keep_singleton);
  Tensor advantages = empty_like(rewards, {rows}), signal = empty_like(rewards, {rows}, ScalarType::Bool);
  TensorLauncher launch(rewards);
  launch_group_advantages(launch, floats_of(rewards), floats_of(weights), rows, rewards.size(1), groups, options,
                          advantages.mutable_data_ptr<float>(), signal.mutable_data_ptr<bool>());
  return {advantages, signal};
}

std::tuple<Tensor, Tensor> group_segments(Tensor group_ids) {
  const int64_t count = group_ids.numel();
  Tensor order = empty_like(group_ids, {count}, ScalarType::Long);
  Tensor offsets = empty_like(group_ids, {count + 1}, ScalarType::Long);
  TensorLauncher launch(group_ids);
  launch_group_segments(launch, {group_ids.const_data_ptr(), dtype_of(group_ids)}, static_cast<int>(count),
                        order.mutable_data_ptr<int64_t>(), offsets.mutable_data_ptr<int64_t>());
  return {order, offsets};
}

Tensor numbers_on_device(std::vector<double> numbers, Tensor like) {
  const int64_t count = static_cast<int64_t>(numbers.size());
  Tensor result = empty_like(like, {count});
  float* const out = result.mutable_data_ptr<float>();
  TensorLauncher launch(like);
  for (int64_t first = 0; first < count; first += kArguments) {
    Numbers some = {};
    for (; some.count < kArguments && first + some.count < count; ++some.count)
      some.values[some.count] = static_cast<float>(numbers[first + some.count]);
    launch_numbers_on_device(launch, some, out + first);
  }
  return result;
}

}  // namespace
}  // namespace rlk

STABLE_TORCH_LIBRARY_IMPL(rlkernels, RLK_CUDA_KEY, m) {
  m.impl("group_advantages.cuda", TORCH_BOX(&rlk::group_advantages));
  m.impl("group_segments.cuda", TORCH_BOX(&rlk::group_segments));
  m.impl("numbers_on_device.cuda", TORCH_BOX(&rlk::numbers_on_device));
}
