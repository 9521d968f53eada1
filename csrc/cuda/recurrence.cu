#include <initializer_list>
#include <type_traits>

#include "recurrence.cuh"

namespace rlk {
namespace {

constexpr int kMomentsThreads = kWarp * kMaxWarps;

template <int kKind, bool kVector>
void launch_kind(Launcher& launch, const RecurrenceBatch& batch, bool whiten) {
  const Sequences& sequences = batch.sequences;
  const int64_t longest_possible = sequences.cu_seqlens != nullptr ? sequences.tokens : sequences.length;
  const bool short_ones = sequences.cu_seqlens != nullptr || sequences.length <= kLongestSerial;
  const bool long_ones = longest_possible > kLongestSerial;
  const int64_t slots = slots_of(sequences);
  const int64_t short_sums = short_ones ? sequences.count : 0, long_sums = long_ones ? slots : 0;
  AdvantageSums* const sums = whiten ? launch.room_for<AdvantageSums>(short_sums + long_sums) : nullptr;
  if (short_ones) launch(recurrence_kernel<kKind, kVector>, sequences.count, kScanThreads, batch, kLongestSerial, sums);
  if (long_ones) {
    BlockSummary* const summaries = launch.room_for<BlockSummary>(slots);
    launch(recurrence_reduce_kernel<kKind, kVector>, slots, kScanThreads, batch, kLongestSerial, summaries);
    launch(recurrence_apply_kernel<kKind, kVector>, slots, kScanThreads, batch, kLongestSerial, summaries,
           whiten ? sums + short_sums : nullptr);
  }
  if (!whiten) return;
  Moments* const moments = launch.room_for<Moments>(1);
  launch(advantage_moments_kernel, 1, kMomentsThreads, sums, short_sums + long_sums, moments);
  launch(whiten_advantages_kernel<kVector>, divide_up(sequences.tokens, kScanBlock), kScanThreads, batch, moments);
}

}  // namespace

void launch_recurrence(Launcher& launch, const RecurrenceBatch& batch, int kind, bool whiten) {
  bool vector = batch.sequences.cu_seqlens == nullptr && batch.sequences.length % kScanTokens == 0;
  for (const void* array :
       std::initializer_list<const void*>{batch.rewards, batch.values, batch.logprobs, batch.behavior_logprobs,
                                          batch.mask, batch.dones, batch.advantages, batch.returns})
    vector = vector && reinterpret_cast<uintptr_t>(array) % 16 == 0;
  const auto with_kind = [&](auto kind) {
    constexpr int kKind = decltype(kind)::value;
    vector ? launch_kind<kKind, true>(launch, batch, whiten) : launch_kind<kKind, false>(launch, batch, whiten);
  };
  switch (kind) {
    case kGae:
      return with_kind(std::integral_constant<int, kGae>());
    case kDiscountedReturns:
      return with_kind(std::integral_constant<int, kDiscountedReturns>());
    case kTdLambda:
      return with_kind(std::integral_constant<int, kTdLambda>());
    default:
      return with_kind(std::integral_constant<int, kVtrace>());
  }
}

}  // namespace rlk
