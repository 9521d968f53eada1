// recurrence: a warp scans a block of tokens, from the end of a sequence to its beginning. No warp waits for another.
#pragma once

#include "inputs.cuh"
#include "recurrence.h"

// The emulation of the tests has smaller ones, since it runs one warp after another.
#ifndef RLK_FEW_SEQUENCES
#define RLK_FEW_SEQUENCES 528
#define RLK_LONGEST_OF_FEW 2048
#endif

namespace rlk {

constexpr int kScanWarps = 4;
constexpr int kScanThreads = kScanWarps * kWarp;
// Runs of tokens that a thread has of a block: run r of lane l begins at token kWarpTokens * r + kRun * l.
constexpr int kRuns = 4;
constexpr int kWarpTokens = kRun * kWarp;
constexpr int kScanBlock = kRuns * kWarpTokens;

// A warp goes through a sequence block by block and reads everything once. Where sequences are few, that leaves most of
// a GPU idle: those that are longer are done by a warp a block, and read twice. Both ways give the same bits.
constexpr int64_t kFewSequences = RLK_FEW_SEQUENCES;  // four warps for each multiprocessor of an H100
constexpr int64_t kLongestOfFew = RLK_LONGEST_OF_FEW, kLongestOfMany = 32768;

// The slots of a sequence's blocks: those of no two sequences overlap, whatever their lengths.
__device__ inline int64_t first_slot(const Sequences& sequences, int64_t s) {
  return sequences.start(s) / kScanBlock + s;
}
inline int64_t slots_of(const Sequences& sequences) { return sequences.tokens / kScanBlock + sequences.count; }

// Where the first block of a sequence starts: at a multiple of 16 bytes of floats. Tokens of the sequence before it are
// not of this one.
__device__ inline int64_t first_block(int64_t begin) { return begin / kRun * kRun; }

// y -> b + (high + low) y. The factor is a product of up to all tokens' factors, and must keep more digits than a float
// has: they are often all the same, and then the rounding of each squaring would go in one direction and double with
// the next. Dekker 1971, "A floating-point technique for extending the available precision".
struct Composite {
  float high, low, b;

  __device__ float a() const { return high + low; }
};

// Where a is 0 an episode ends, and not even an infinity flows back; kDense says that there are no such tokens.
template <bool kDense>
__device__ float step(float a, float b, float y) {
  const float result = fmaf(a, y, b);
  return kDense || a != 0.0f ? result : b;
}

template <bool kDense>
__device__ Composite compose(const Composite& later, const Composite& earlier) {
  const float high = product(earlier.high, later.high);
  const float error = fmaf(earlier.high, later.high, -high);
  const float low = fmaf(earlier.high, later.low, fmaf(earlier.low, later.high, error));
  const bool ends = !kDense && earlier.high == 0.0f;
  return {ends ? 0.0f : high, ends ? 0.0f : low, step<kDense>(earlier.a(), earlier.b, later.b)};
}

// The composite of one token and of those behind it.
template <bool kDense>
__device__ Composite compose(const Composite& later, float a, float b) {
  const float high = product(a, later.high), low = fmaf(a, later.low, fmaf(a, later.high, -high));
  const bool ends = !kDense && a == 0.0f;
  return {ends ? 0.0f : high, ends ? 0.0f : low, step<kDense>(a, b, later.b)};
}

__device__ inline int run_start(int r) { return r * kWarpTokens + threadIdx.x % kWarp * kRun; }

__device__ inline float of_lane(float value, int lane) { return __shfl_sync(0xffffffffu, value, lane); }

// A thread's runs of a block: which tokens are scored or end an episode, their values, what each adds to the
// recurrence, and what all tokens from the run to the block's end do to what lies behind the block.
struct Runs {
  FlagRun scored[kRuns], done[kRuns];
  float value[kRuns][kRun];
  RecurrenceTerm<float> term[kRuns][kRun];
  float a[kRuns], b[kRuns];
};

// Behind a block, or of all its tokens: y -> b + a y.
struct BlockSummary {
  float a, b, next_value;
};

template <bool kPlain>
__device__ void load_runs(Floats array, const Range& range, float (&values)[kRuns][kRun]) {
#pragma unroll
  for (int r = 0; r < kRuns; ++r) load_run<kPlain>(array, range, run_start(r), values[r]);
}

// The tokens of [begin, end) in the block from `start`.
__device__ inline Range block_range(int64_t start, int64_t begin, int64_t end) {
  return {start, begin > start ? static_cast<int>(begin - start) : 0,
          end - start < kScanBlock ? static_cast<int>(end - start) : kScanBlock};
}

// Scans the block from `start`. `next_value` is that behind the block and becomes the one that the block passes back;
// `bootstrap` is that behind the sequence.
template <int kKind, bool kPlain, bool kDense>
__device__ Runs scan_block(const RecurrenceBatch& batch, const Range& range, float bootstrap, BlockSummary& block) {
  const int lane = threadIdx.x % kWarp;
  Runs runs;
  float reward[kRuns][kRun], logprob[kRuns][kRun] = {}, behavior[kRuns][kRun] = {};
  load_runs<kPlain>(batch.rewards, range, reward);
  if (kKind != kDiscountedReturns) load_runs<kPlain>(batch.values, range, runs.value);
  if (kKind == kVtrace) {
    load_runs<kPlain>(batch.logprobs, range, logprob);
    load_runs<kPlain>(batch.behavior_logprobs, range, behavior);
  }
#pragma unroll
  for (int r = 0; r < kRuns; ++r) {
    runs.scored[r] = load_run<kPlain>(kDense ? Flags{} : batch.mask, range, run_start(r));
    runs.done[r] = {};
    if (!kDense && batch.dones.data != nullptr) runs.done[r] = load_run<kPlain>(batch.dones, range, run_start(r));
  }
  Composite behind = {1.0f, 0.0f, 0.0f};
#pragma unroll
  for (int r = kRuns - 1; r >= 0; --r) {
    float (&value)[kRun] = runs.value[r];
    const FlagRun scored = runs.scored[r], done = runs.done[r];
    const bool inside = run_start(r) < range.end;
    float next = 0.0f;
    if (kKind != kDiscountedReturns && kDense) {
      if (!inside) value[0] = bootstrap;
      next = shuffle_down(value[0], 1);
      if (lane + 1 == kWarp) next = block.next_value;
      block.next_value = of_lane(value[0], 0);
    } else if (kKind != kDiscountedReturns) {
      bool known = false;
      float passed = 0.0f;
#pragma unroll
      for (int i = kRun - 1; i >= 0; --i) {
        if (!scored[i] && !done[i]) continue;
        known = true;
        passed = scored[i] ? value[i] : 0.0f;
      }
      const unsigned lanes = __ballot_sync(0xffffffffu, known), later = lanes >> lane >> 1;
      next = of_lane(passed, later != 0 ? lane + __ffs(later) : 0);
      if (later == 0) next = block.next_value;
      if (lanes != 0) block.next_value = of_lane(passed, __ffs(lanes) - 1);
    }
    Composite all = {};
#pragma unroll
    for (int i = kRun - 1; i >= 0; --i) {
      const bool is_scored = kDense ? inside : scored[i], ends = !kDense && done[i];
      if (ends) next = 0.0f;
      RecurrenceTerm<float>& term = runs.term[r][i];
      term = recurrence_term(batch.options, kKind, reward[r][i], kKind == kDiscountedReturns ? 0.0f : value[i], next,
                             logprob[r][i], behavior[r][i]);
      term.a = ends ? 0.0f : is_scored ? term.a : 1.0f;
      term.b = is_scored ? term.b : 0.0f;
      all = i + 1 < kRun ? compose<kDense>(all, term.a, term.b) : Composite{term.a, 0.0f, term.b};
      if (kKind != kDiscountedReturns && (kDense || is_scored)) next = value[i];
    }
#pragma unroll
    for (int lanes = 1; lanes < static_cast<int>(kWarp); lanes *= 2) {
      const Composite later = shuffle_down(all, lanes);
      // Selected, not branched on: nvcc would copy the three floats.
      const bool there = lane + lanes < static_cast<int>(kWarp);
      all = compose<kDense>({there ? later.high : 1.0f, there ? later.low : 0.0f, there ? later.b : 0.0f}, all);
    }
    if (r + 1 < kRuns) all = compose<kDense>(behind, all);
    behind = {of_lane(all.high, 0), of_lane(all.low, 0), of_lane(all.b, 0)};
    runs.a[r] = all.a();
    runs.b[r] = all.b;
  }
  block.a = behind.a();
  block.b = behind.b;
  return runs;
}

// Sums over advantages. They are in double, in which a float's square is exact.
struct AdvantageSums {
  double count, sum, squares;
};

__device__ inline AdvantageSums operator+(const AdvantageSums& a, const AdvantageSums& b) {
  return {a.count + b.count, a.sum + b.sum, a.squares + b.squares};
}

// Writes the results of a block, behind which y is; adds this thread's advantages to `sums`.
template <int kKind, bool kPlain, bool kDense, bool kSums>
__device__ void finish_block(const RecurrenceBatch& batch, const Runs& runs, const Range& range, float y,
                             AdvantageSums& sums) {
  const int lane = threadIdx.x % kWarp;
  float behind = y;  // the next run's y, for the last lane
#pragma unroll
  for (int r = kRuns - 1; r >= 0; --r) {
    const float of_run = step<kDense>(runs.a[r], runs.b[r], y);
    float y_next = shuffle_down(of_run, 1);
    if (lane + 1 == kWarp) y_next = behind;
    behind = of_lane(of_run, 0);
    float advantages[kRun], returns[kRun];
#pragma unroll
    for (int i = kRun - 1; i >= 0; --i) {
      const RecurrenceTerm<float>& term = runs.term[r][i];
      const float y_here = step<kDense>(term.a, term.b, y_next);
      if (!kDense && runs.done[r][i]) y_next = 0.0f;
      const float value = has_advantages(kKind) ? runs.value[r][i] : 0.0f;
      const float advantage = recurrence_advantage(batch.options, kKind, term, y_here, y_next);
      // Nothing is written where dense runs are not inside.
      const bool is_scored = kDense || runs.scored[r][i];
      advantages[i] = is_scored ? advantage : 0.0f;
      returns[i] = is_scored ? recurrence_return(kKind, value, y_here) : 0.0f;
      if (kSums && runs.scored[r][i]) sums = sums + AdvantageSums{1.0, advantage, double{advantage} * advantage};
      y_next = y_here;
    }
    if (has_advantages(kKind)) store_run<kPlain>(batch.advantages, range, run_start(r), advantages);
    store_run<kPlain>(batch.returns, range, run_start(r), returns);
  }
}

__device__ inline void store_sums(AdvantageSums sums, AdvantageSums* at) {
#pragma unroll
  for (int lanes = kWarp / 2; lanes > 0; lanes /= 2) sums = sums + shuffle_xor(sums, lanes);
  if (threadIdx.x % kWarp == 0) *at = sums;
}

template <bool kPlain>
__device__ float bootstrap_of(const RecurrenceBatch& batch, int64_t s) {
  return batch.bootstrap_values.data != nullptr ? element<kPlain>(batch.bootstrap_values, s) : 0.0f;
}

// The value behind a block: where nothing is masked that of the very next token.
template <bool kPlain>
__device__ float value_behind(const RecurrenceBatch& batch, int64_t token, int64_t end, float bootstrap) {
  return token < end ? element<kPlain>(batch.values, token) : bootstrap;
}

// Warp s: sequence s, unless it is longer than `longest`. sums [sequences] are for kSums.
template <int kKind, bool kPlain, bool kDense, bool kSums>
__global__ void __launch_bounds__(kScanThreads)
    recurrence_kernel(RecurrenceBatch batch, int64_t longest, AdvantageSums* sums) {
  const Sequences& sequences = batch.sequences;
  const int64_t s = int64_t{blockIdx.x} * kScanWarps + threadIdx.x / kWarp;
  if (!batch.usable()) {
    // Nobody knows where sequences are: every token is reached, and made NaN, by an equal share each.
    for (int64_t token = int64_t{blockIdx.x} * kScanThreads + threadIdx.x; token < sequences.tokens;
         token += int64_t{gridDim.x} * kScanThreads) {
      if (has_advantages(kKind)) batch.advantages[token] = kNan;
      batch.returns[token] = kNan;
    }
  }
  if (s >= sequences.count) return;
  const int64_t begin = sequences.start(s), end = sequences.start(s + 1);
  AdvantageSums thread_sums = {};
  if (batch.usable() && end - begin <= longest) {
    const float bootstrap = bootstrap_of<kPlain>(batch, s);
    BlockSummary block = {1.0f, 0.0f, bootstrap};
    float y = starts_with_bootstrap(kKind) ? bootstrap : 0.0f;
    const int64_t first = first_block(begin);
    for (int64_t start = first + (end - first - 1) / kScanBlock * kScanBlock; start >= first; start -= kScanBlock) {
      const Range range = block_range(start, begin, end);
      const Runs runs = scan_block<kKind, kPlain, kDense>(batch, range, bootstrap, block);
      finish_block<kKind, kPlain, kDense, kSums>(batch, runs, range, y, thread_sums);
      y = step<kDense>(block.a, block.b, y);
    }
  }
  if (kSums) store_sums(thread_sums, sums + s);
}

// A block of a long sequence.
struct LongBlock {
  int64_t sequence, begin, start, end, index, slot;
  bool exists;
};

__device__ inline LongBlock long_block(const RecurrenceBatch& batch, int64_t longest) {
  LongBlock block = {};
  block.slot = int64_t{blockIdx.x} * kScanWarps + threadIdx.x / kWarp;
  // The last sequence whose slots do not begin after this one.
  int64_t low = 0, high = batch.sequences.count;
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    if (first_slot(batch.sequences, middle) <= block.slot)
      low = middle + 1;
    else
      high = middle;
  }
  if (low == 0 || !batch.usable()) return block;
  block.sequence = low - 1;
  block.begin = batch.sequences.start(block.sequence);
  block.end = batch.sequences.start(block.sequence + 1);
  block.index = block.slot - first_slot(batch.sequences, block.sequence);
  block.start = first_block(block.begin) + block.index * kScanBlock;
  block.exists = block.end - block.begin > longest && block.start < block.end;
  return block;
}

// Warp i: slot i.
template <int kKind, bool kPlain, bool kDense>
__global__ void __launch_bounds__(kScanThreads)
    recurrence_reduce_kernel(RecurrenceBatch batch, int64_t longest, BlockSummary* summaries) {
  const LongBlock block = long_block(batch, longest);
  if (!block.exists) return;
  const float bootstrap = bootstrap_of<kPlain>(batch, block.sequence);
  BlockSummary summary = {1.0f, 0.0f, bootstrap};
  if (kKind != kDiscountedReturns && kDense)
    summary.next_value = value_behind<kPlain>(batch, block.start + kScanBlock, block.end, bootstrap);
  if (kKind != kDiscountedReturns && !kDense) {
    // The first token behind the block that is scored or ends an episode; most often among the very next.
    const int lane = threadIdx.x % kWarp;
    unsigned lanes = 0;
    for (int64_t next = block.start + kScanBlock; next < block.end && lanes == 0; next += kWarp) {
      const int64_t token = next + lane;
      const bool inside = token < block.end;
      const bool scored = inside && (batch.mask.data == nullptr || element<kPlain>(batch.mask, token));
      const bool done = inside && batch.dones.data != nullptr && element<kPlain>(batch.dones, token);
      lanes = __ballot_sync(0xffffffffu, scored || done);
      const float value = scored ? element<kPlain>(batch.values, token) : 0.0f;
      if (lanes != 0) summary.next_value = of_lane(value, __ffs(lanes) - 1);
    }
  }
  const float next_value = summary.next_value;
  scan_block<kKind, kPlain, kDense>(batch, block_range(block.start, block.begin, block.end), bootstrap, summary);
  summary.next_value = next_value;
  if (threadIdx.x % kWarp == 0) summaries[block.slot] = summary;
}

// Warp i: slot i. sums [slots] are for kSums.
template <int kKind, bool kPlain, bool kDense, bool kSums>
__global__ void __launch_bounds__(kScanThreads)
    recurrence_apply_kernel(RecurrenceBatch batch, int64_t longest, const BlockSummary* summaries, int64_t slots,
                            AdvantageSums* sums) {
  const LongBlock block = long_block(batch, longest);
  AdvantageSums thread_sums = {};
  if (block.exists) {
    const int lane = threadIdx.x % kWarp;
    const float bootstrap = bootstrap_of<kPlain>(batch, block.sequence);
    float y = starts_with_bootstrap(kKind) ? bootstrap : 0.0f;
    // The blocks behind this one, from the last to the first, as recurrence_kernel goes through them.
    const int64_t blocks = (block.end - first_block(block.begin) + kScanBlock - 1) / kScanBlock;
    for (int64_t last = blocks - 1; last > block.index; last -= kWarp) {
      const int64_t other = last - lane;
      BlockSummary summary = {};
      if (other > block.index) summary = summaries[block.slot - block.index + other];
      for (int l = 0; l < static_cast<int>(kWarp) && last - l > block.index; ++l)
        y = step<kDense>(of_lane(summary.a, l), of_lane(summary.b, l), y);
    }
    BlockSummary summary = summaries[block.slot];
    const Runs runs =
        scan_block<kKind, kPlain, kDense>(batch, block_range(block.start, block.begin, block.end), bootstrap, summary);
    finish_block<kKind, kPlain, kDense, kSums>(batch, runs, block_range(block.start, block.begin, block.end), y,
                                               thread_sums);
  }
  if (kSums && block.slot < slots) store_sums(thread_sums, sums + block.slot);
}

// What whitens advantages, unless fewer than two are scored.
struct Moments {
  AdvantageWhitening whitening;
  int several;
};

// One block of threads adds up `count` sums.
__global__ void advantage_moments_kernel(const AdvantageSums* sums, int64_t count, Moments* moments) {
  AdvantageSums total = {};
  for (int64_t i = threadIdx.x; i < count; i += blockDim.x) total = total + sums[i];
  total = block_reduce(total, [](const AdvantageSums& a, const AdvantageSums& b) { return a + b; });
  if (threadIdx.x != 0) return;
  const bool several = total.count > 1.0;
  *moments = {advantage_whitening(several ? total.count : 2.0, total.sum, total.squares), several};
}

// A thread per run of tokens.
template <bool kPlain>
__global__ void __launch_bounds__(kScanThreads)
    whiten_advantages_kernel(RecurrenceBatch batch, const Moments* moments) {
  const int64_t start = int64_t{blockIdx.x} * kScanThreads * kRun;
  const int64_t left = batch.sequences.tokens - start;
  const Range range = {start, 0, left < kScanThreads * kRun ? static_cast<int>(left) : kScanThreads * kRun};
  const int first = threadIdx.x * kRun;
  float advantages[kRun];
  load_run<kPlain>(Floats{batch.advantages, Dtype::kFloat}, range, first, advantages);
  const FlagRun scored = load_run<kPlain>(batch.mask, range, first);
  const Moments m = *moments;
  const float invalid = batch.usable() ? 0.0f : kNan;
#pragma unroll
  for (int i = 0; i < kRun; ++i) {
    const bool counts = m.several != 0 && scored[i];
    advantages[i] = (counts ? whiten_advantage(m.whitening, advantages[i]) : 0.0f) + invalid;
  }
  store_run<kPlain>(batch.advantages, range, first, advantages);
}

}  // namespace rlk
