#include <initializer_list>
#include <type_traits>

#include "launch.h"
#include "recurrence.cuh"

namespace rlk {
namespace {

constexpr int kMomentsThreads = kWarp * kMaxWarps;

template <typename T>
T* data_of(Tensor& tensor) {
  return static_cast<T*>(tensor.data_ptr());
}

template <int kKind, bool kVector>
void launch_recurrence(const Launcher& launch, const RecurrenceBatch& batch, const Tensor& like, bool whiten) {
  const Sequences& sequences = batch.sequences;
  const int64_t longest_possible = sequences.cu_seqlens != nullptr ? sequences.tokens : sequences.length;
  const bool short_ones = sequences.cu_seqlens != nullptr || sequences.length <= kLongestSerial;
  const bool long_ones = longest_possible > kLongestSerial;
  const int64_t short_sums = short_ones ? sequences.count : 0, long_sums = long_ones ? batch.slots() : 0;
  const auto room_for = [&](int64_t count, size_t size) {
    return empty_like(like, {count * static_cast<int64_t>(size)}, ScalarType::Byte);
  };
  std::optional<Tensor> sums_memory;
  AdvantageSums* sums = nullptr;
  if (whiten) {
    sums_memory = room_for(short_sums + long_sums, sizeof(AdvantageSums));
    sums = data_of<AdvantageSums>(*sums_memory);
  }
  if (short_ones) launch(recurrence_kernel<kKind, kVector>, sequences.count, kScanThreads, batch, kLongestSerial, sums);
  if (long_ones) {
    Tensor summaries = room_for(batch.slots(), sizeof(BlockSummary));
    launch(recurrence_reduce_kernel<kKind, kVector>, batch.slots(), kScanThreads, batch, kLongestSerial,
           data_of<BlockSummary>(summaries));
    launch(recurrence_apply_kernel<kKind, kVector>, batch.slots(), kScanThreads, batch, kLongestSerial,
           data_of<BlockSummary>(summaries), whiten ? sums + short_sums : nullptr);
  }
  if (!whiten) return;
  Tensor moments = room_for(1, sizeof(Moments));
  launch(advantage_moments_kernel, 1, kMomentsThreads, sums, short_sums + long_sums, data_of<Moments>(moments));
  launch(whiten_advantages_kernel<kVector>, divide_up(sequences.tokens, kScanBlock), kScanThreads, batch,
         data_of<Moments>(moments));
}

std::tuple<Tensor, Tensor> recurrence(Tensor rewards, std::optional<Tensor> values, std::optional<Tensor> logprobs,
                                      std::optional<Tensor> behavior_logprobs, std::optional<Tensor> mask,
                                      std::optional<Tensor> dones, std::optional<Tensor> cu_seqlens,
                                      std::optional<Tensor> bootstrap_values, std::optional<Tensor> valid, int64_t kind,
                                      double gamma, double lam, double rho_clip, double c_clip, bool whiten) {
  const Launcher launch(rewards);
  const bool advantageous = has_advantages(static_cast<int>(kind));
  Tensor advantages = advantageous ? empty_like(rewards, rewards.sizes()) : empty_like(rewards, {0});
  Tensor returns = empty_like(rewards, rewards.sizes());
  if (rewards.numel() == 0) return {advantages, returns};

  RecurrenceBatch batch = {};
  batch.rewards = floats(rewards);
  batch.values = data_or_null<float>(values);
  batch.logprobs = data_or_null<float>(logprobs);
  batch.behavior_logprobs = data_or_null<float>(behavior_logprobs);
  batch.mask = data_or_null<bool>(mask);
  batch.dones = data_or_null<bool>(dones);
  batch.bootstrap_values = data_or_null<float>(bootstrap_values);
  batch.valid = data_or_null<float>(valid);
  batch.sequences = sequences_of(rewards, cu_seqlens);
  batch.options = make_recurrence_options(static_cast<int>(kind), gamma, lam, rho_clip, c_clip);
  batch.advantages = advantageous ? advantages.mutable_data_ptr<float>() : nullptr;
  batch.returns = returns.mutable_data_ptr<float>();
  bool vector = !cu_seqlens && batch.sequences.length % kScanTokens == 0;
  for (const void* array :
       std::initializer_list<const void*>{batch.rewards, batch.values, batch.logprobs, batch.behavior_logprobs,
                                          batch.mask, batch.dones, batch.advantages, batch.returns})
    vector = vector && reinterpret_cast<uintptr_t>(array) % 16 == 0;
  const auto launch_kind = [&](auto kind) {
    constexpr int kKind = decltype(kind)::value;
    vector ? launch_recurrence<kKind, true>(launch, batch, rewards, whiten)
           : launch_recurrence<kKind, false>(launch, batch, rewards, whiten);
  };
  switch (kind) {
    case kGae:
      launch_kind(std::integral_constant<int, kGae>());
      break;
    case kDiscountedReturns:
      launch_kind(std::integral_constant<int, kDiscountedReturns>());
      break;
    case kTdLambda:
      launch_kind(std::integral_constant<int, kTdLambda>());
      break;
    default:
      launch_kind(std::integral_constant<int, kVtrace>());
  }
  return {advantages, returns};
}

}  // namespace
}  // namespace rlk

STABLE_TORCH_LIBRARY_IMPL(rlkernels, RLK_CUDA_KEY, m) { m.impl("recurrence.cuda", TORCH_BOX(&rlk::recurrence)); }
