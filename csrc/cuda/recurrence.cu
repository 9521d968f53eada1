#include <initializer_list>
#include <type_traits>

#include "recurrence.cuh"
#include "sequences.cuh"

namespace rlk {
namespace {

constexpr int kMomentsThreads = kWarp * kMaxWarps;

template <int kKind, bool kPlain, bool kDense, bool kSums>
void launch_variant(Launcher& launch, const RecurrenceBatch& batch) {
  const Sequences& sequences = batch.sequences;
  const int64_t longest = sequences.count < kFewSequences ? kLongestOfFew : kLongestOfMany;
  const bool packed = sequences.cu_seqlens != nullptr;
  const bool short_ones = packed || sequences.length <= longest;
  const bool long_ones = (packed ? sequences.tokens : sequences.length) > longest;
  const int64_t slots = slots_of(sequences);
  const int64_t short_sums = short_ones ? sequences.count : 0, long_sums = long_ones ? slots : 0;
  AdvantageSums* const sums = kSums ? launch.room_for<AdvantageSums>(short_sums + long_sums) : nullptr;
  if (short_ones)
    launch(recurrence_kernel<kKind, kPlain, kDense, kSums>, divide_up(sequences.count, kScanWarps), kScanThreads, batch,
           longest, sums);
  if (long_ones) {
    BlockSummary* const summaries = launch.room_for<BlockSummary>(slots);
    const int64_t blocks = divide_up(slots, kScanWarps);
    launch(recurrence_reduce_kernel<kKind, kPlain, kDense>, blocks, kScanThreads, batch, longest, summaries);
    launch(recurrence_apply_kernel<kKind, kPlain, kDense, kSums>, blocks, kScanThreads, batch, longest, summaries,
           slots, kSums ? sums + short_sums : nullptr);
  }
  if (!kSums) return;
  Moments* const moments = launch.room_for<Moments>(1);
  launch(advantage_moments_kernel, 1, kMomentsThreads, sums, short_sums + long_sums, moments);
  launch(whiten_advantages_kernel<kPlain>, divide_up(sequences.tokens, kScanThreads * kRun), kScanThreads, batch,
         moments);
}

// kPlain: sequences also begin and end at multiples of 16 bytes. kDense: every token is scored, and no episode ends but
// with its sequence.
template <int kKind, bool kSums>
void launch_kind(Launcher& launch, const RecurrenceBatch& batch) {
  const bool even = batch.sequences.cu_seqlens == nullptr && batch.sequences.length % kRun == 0;
  const bool plain =
      even && all_plain({batch.rewards, batch.values, batch.logprobs, batch.behavior_logprobs, batch.bootstrap_values},
                        {batch.mask, batch.dones});
  if (!plain) return launch_variant<kKind, false, false, kSums>(launch, batch);
  if (batch.mask.data == nullptr && batch.dones.data == nullptr)
    return launch_variant<kKind, true, true, kSums>(launch, batch);
  launch_variant<kKind, true, false, kSums>(launch, batch);
}

}  // namespace

void launch_recurrence(Launcher& launch, RecurrenceBatch batch, int kind, bool whiten) {
  batch.valid = launch_valid(launch, batch.sequences);
  switch (kind) {
    case kGae:
      return whiten ? launch_kind<kGae, true>(launch, batch) : launch_kind<kGae, false>(launch, batch);
    case kDiscountedReturns:
      return launch_kind<kDiscountedReturns, false>(launch, batch);
    case kTdLambda:
      return launch_kind<kTdLambda, false>(launch, batch);
    default:
      return launch_kind<kVtrace, false>(launch, batch);
  }
}

}  // namespace rlk
