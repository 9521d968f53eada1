#include "cpu/groups.h"

#include "bindings.h"

namespace rlk {
namespace {

std::tuple<Tensor, Tensor> group_advantages(Tensor rewards, std::optional<Tensor> weights, std::optional<Tensor> order,
                                            std::optional<Tensor> offsets, int64_t group_size, int64_t baseline,
                                            int64_t scale, double eps, bool normalize_before_sum, bool keep_singleton) {
  const GroupAdvantages problem = {floats(rewards),
                                   data_or_null<float>(weights),
                                   data_or_null<int64_t>(order),
                                   data_or_null<int64_t>(offsets),
                                   rewards.size(0),
                                   rewards.size(1),
                                   group_size,
                                   make_group_options(baseline, scale, eps, normalize_before_sum, keep_singleton)};
  Tensor advantages = empty_floats({rewards.size(0)});
  Tensor signal = torch::stable::empty({rewards.size(0)}, ScalarType::Bool);
  with_kernels<GroupsKernels>([&](auto kernels) {
    kernels.group_advantages(problem, advantages.mutable_data_ptr<float>(), signal.mutable_data_ptr<bool>());
  });
  return {advantages, signal};
}

}  // namespace
}  // namespace rlk

STABLE_TORCH_LIBRARY_IMPL(rlkernels, CPU, m) { m.impl("group_advantages.cpu", TORCH_BOX(&rlk::group_advantages)); }
