// recurrence: a block of threads scans a block of tokens, from the end of a sequence to its beginning.
#pragma once

#include "block.cuh"
#include "recurrence.h"

// The emulation of the tests has a shorter one, since it runs one block after another.
#ifndef RLK_LONGEST_SERIAL
#define RLK_LONGEST_SERIAL 32768
#endif

namespace rlk {

constexpr int kScanThreads = 256;
// A thread's tokens: as many as one read of 16 bytes brings.
constexpr int kScanTokens = 4;
constexpr int kScanBlock = kScanThreads * kScanTokens;
// A block of threads goes through a sequence alone, and reads everything once. One that is longer than this would keep
// a GPU waiting for a single block: its blocks are reduced side by side, and read again once each knows what lies
// behind it. Which way a sequence goes depends on its length alone, and so do its bits.
constexpr int64_t kLongestSerial = RLK_LONGEST_SERIAL;

// The slots of a sequence's blocks: those of no two sequences overlap, whatever their lengths.
__device__ inline int64_t first_slot(const Sequences& sequences, int64_t s) {
  return sequences.start(s) / kScanBlock + s;
}
inline int64_t slots_of(const Sequences& sequences) { return sequences.tokens / kScanBlock + sequences.count; }

// The value that a stretch of tokens passes back: its first, or that of the stretch behind it.
struct PassedValue {
  int known;
  float value;
};

__device__ inline PassedValue compose(PassedValue later, PassedValue earlier) {
  return earlier.known ? earlier : later;
}

// y -> b + a y. A number y is {0, y}. Where a is 0 an episode ends, and not even an infinity flows back. a is a product
// of up to all tokens' factors, in double: they are often all the same, and then the float rounding of each squaring
// would go in one direction and double with the next.
struct Composite {
  double a;
  float b;
};

__device__ inline Composite compose(Composite later, Composite earlier) {
  if (earlier.a == 0.0) return earlier;
  return {earlier.a * later.a, earlier.b + static_cast<float>(earlier.a) * later.b};
}

template <typename T>
__device__ T shuffle_down(T value, int lanes) {
  static_assert(sizeof(T) % 4 == 0);
  unsigned words[sizeof(T) / 4];
  memcpy(words, &value, sizeof value);
#pragma unroll
  for (unsigned& word : words) word = __shfl_down_sync(0xffffffffu, word, lanes);
  memcpy(&value, words, sizeof value);
  return value;
}

// What lies behind this thread's `mine`: that of all threads after it, and then `behind`, to which all are then added.
template <typename T>
__device__ T scan_back(T mine, T& behind) {
  __shared__ T warps[kScanThreads / kWarp];
  const unsigned lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
#pragma unroll
  for (unsigned lanes = 1; lanes < kWarp; lanes *= 2) {
    const T later = shuffle_down(mine, lanes);
    if (lane + lanes < kWarp) mine = compose(later, mine);
  }
  if (lane == 0) warps[warp] = mine;
  __syncthreads();
  T before = behind;
#pragma unroll
  for (int w = kScanThreads / kWarp - 1; w >= 0; --w) {
    if (w == static_cast<int>(warp)) before = behind;
    behind = compose(behind, warps[w]);
  }
  // The next scan writes where slower warps still read.
  __syncthreads();
  const T later = shuffle_down(mine, 1);
  return lane + 1 < kWarp ? compose(before, later) : before;
}

// A thread's tokens of a block.
struct Tokens {
  float reward[kScanTokens], value[kScanTokens], logprob[kScanTokens], behavior_logprob[kScanTokens];
  bool scored[kScanTokens], done[kScanTokens];
};

// Where kVector, sequences begin and end at multiples of 16 bytes: a thread's tokens are all within one, or none is.
template <bool kVector, typename T>
__device__ void load_tokens(const T* array, int64_t first, int64_t end, T (&values)[kScanTokens]) {
  if constexpr (kVector) {
    struct alignas(sizeof values) Vector {
      T values[kScanTokens];
    };
    if (first >= end) return;
    const Vector loaded = *reinterpret_cast<const Vector*>(array + first);
    memcpy(values, &loaded, sizeof values);
  } else {
#pragma unroll
    for (int i = 0; i < kScanTokens; ++i)
      if (first + i < end) values[i] = array[first + i];
  }
}

template <bool kVector>
__device__ void store_tokens(float* array, int64_t first, int64_t end, const float (&values)[kScanTokens]) {
  if constexpr (kVector) {
    // nvcc would turn an assignment into four stores for sm_80 and sm_90.
    if (first < end)
      __stcg(reinterpret_cast<float4*>(array + first), make_float4(values[0], values[1], values[2], values[3]));
  } else {
#pragma unroll
    for (int i = 0; i < kScanTokens; ++i)
      if (first + i < end) array[first + i] = values[i];
  }
}

template <int kKind, bool kVector>
__device__ Tokens load_tokens(const RecurrenceBatch& batch, int64_t start, int64_t end) {
  const int64_t first = start + threadIdx.x * kScanTokens;
  Tokens tokens = {};
  load_tokens<kVector>(batch.rewards, first, end, tokens.reward);
  if (kKind != kDiscountedReturns) load_tokens<kVector>(batch.values, first, end, tokens.value);
  if (kKind == kVtrace) {
    load_tokens<kVector>(batch.logprobs, first, end, tokens.logprob);
    load_tokens<kVector>(batch.behavior_logprobs, first, end, tokens.behavior_logprob);
  }
  if (batch.mask != nullptr) load_tokens<kVector>(batch.mask, first, end, tokens.scored);
  if (batch.dones != nullptr) load_tokens<kVector>(batch.dones, first, end, tokens.done);
#pragma unroll
  for (int i = 0; i < kScanTokens; ++i)
    tokens.scored[i] = first + i < end && (batch.mask == nullptr || tokens.scored[i]);
  return tokens;
}

// What lies behind a block of tokens.
struct Behind {
  PassedValue value;
  Composite y;
};

template <int kKind>
__device__ Behind behind_sequence(float bootstrap) {
  return {{1, bootstrap}, {0.0, starts_with_bootstrap(kKind) ? bootstrap : 0.0f}};
}

// A thread's tokens: what each adds to the recurrence, and what all of them do to what lies behind them.
struct Terms {
  RecurrenceTerm<float> term[kScanTokens];
  Composite all;
};

template <int kKind>
__device__ Terms scan_values(const RecurrenceBatch& batch, const Tokens& tokens, PassedValue& behind) {
  float next_value = 0.0f;
  if (kKind != kDiscountedReturns) {
    PassedValue mine = {0, 0.0f};
#pragma unroll
    for (int i = kScanTokens - 1; i >= 0; --i) {
      if (tokens.done[i]) mine = {1, 0.0f};
      if (tokens.scored[i]) mine = {1, tokens.value[i]};
    }
    next_value = scan_back(mine, behind).value;
  }
  Terms terms = {};
  terms.all = {1.0, 0.0f};
#pragma unroll
  for (int i = kScanTokens - 1; i >= 0; --i) {
    if (tokens.done[i]) {
      next_value = 0.0f;
      terms.all = {0.0, 0.0f};
    }
    if (!tokens.scored[i]) continue;
    terms.term[i] = recurrence_term(batch.options, kKind, tokens.reward[i], tokens.value[i], next_value,
                                    tokens.logprob[i], tokens.behavior_logprob[i]);
    terms.all = compose(terms.all, {terms.term[i].a, terms.term[i].b});
    next_value = tokens.value[i];
  }
  return terms;
}

// Sums over advantages. They are in double, in which a float's square is exact.
struct AdvantageSums {
  double count, sum, squares;
};

__device__ inline AdvantageSums operator+(AdvantageSums a, AdvantageSums b) {
  return {a.count + b.count, a.sum + b.sum, a.squares + b.squares};
}

// Writes the results of a block; returns the sums of this thread's advantages.
template <int kKind, bool kVector>
__device__ AdvantageSums scan_block(const RecurrenceBatch& batch, const Tokens& tokens, int64_t start, int64_t end,
                                    Behind& behind) {
  const Terms terms = scan_values<kKind>(batch, tokens, behind.value);
  float y = scan_back(terms.all, behind.y).b;
  float advantages[kScanTokens], returns[kScanTokens];
  AdvantageSums sums = {};
#pragma unroll
  for (int i = kScanTokens - 1; i >= 0; --i) {
    advantages[i] = returns[i] = 0.0f;
    if (tokens.done[i]) y = 0.0f;
    if (!tokens.scored[i]) continue;
    const RecurrenceTerm<float>& term = terms.term[i];
    const float y_next = y;
    y = compose(Composite{0.0, y_next}, Composite{term.a, term.b}).b;
    returns[i] = recurrence_return(kKind, tokens.value[i], y);
    if (!has_advantages(kKind)) continue;
    const float advantage = advantages[i] = recurrence_advantage(batch.options, kKind, term, y, y_next);
    sums = sums + AdvantageSums{1.0, advantage, double{advantage} * advantage};
  }
  const int64_t first = start + threadIdx.x * kScanTokens;
  if (has_advantages(kKind)) store_tokens<kVector>(batch.advantages, first, end, advantages);
  store_tokens<kVector>(batch.returns, first, end, returns);
  return sums;
}

__device__ inline void store_sums(AdvantageSums sums, AdvantageSums* at) {
  if (at == nullptr) return;
  sums = block_reduce(sums, [](const AdvantageSums& a, const AdvantageSums& b) { return a + b; });
  if (threadIdx.x == 0) *at = sums;
}

// Block s: sequence s, unless it is longer than `longest`. sums [sequences] may be null.
template <int kKind, bool kVector>
__global__ void __launch_bounds__(kScanThreads)
    recurrence_kernel(RecurrenceBatch batch, int64_t longest, AdvantageSums* sums) {
  const int64_t s = blockIdx.x;
  AdvantageSums* const sequence_sums = sums != nullptr ? sums + s : nullptr;
  if (!batch.usable()) {
    // Nobody knows where sequences are: every token is reached, and made NaN, by an equal share each.
    for (int64_t token = s * kScanThreads + threadIdx.x; token < batch.sequences.tokens;
         token += int64_t{gridDim.x} * kScanThreads) {
      if (has_advantages(kKind)) batch.advantages[token] = kNan;
      batch.returns[token] = kNan;
    }
    return store_sums({}, sequence_sums);
  }
  const int64_t begin = batch.sequences.start(s), end = batch.sequences.start(s + 1);
  if (end - begin > longest) return store_sums({}, sequence_sums);
  Behind behind = behind_sequence<kKind>(batch.bootstrap(s));
  AdvantageSums thread_sums = {};
  int64_t start = begin + (end - begin - 1) / kScanBlock * kScanBlock;
  Tokens tokens = load_tokens<kKind, kVector>(batch, start, end);
  for (; start >= begin; start -= kScanBlock) {
    // Read while this block is scanned.
    Tokens next = {};
    if (start > begin) next = load_tokens<kKind, kVector>(batch, start - kScanBlock, end);
    thread_sums = thread_sums + scan_block<kKind, kVector>(batch, tokens, start, end, behind);
    tokens = next;
  }
  store_sums(thread_sums, sequence_sums);
}

// A block of a long sequence.
struct LongBlock {
  int64_t sequence, begin, start, end, index, slot;
  bool exists;
};

__device__ inline LongBlock long_block(const RecurrenceBatch& batch, int64_t longest) {
  // The last sequence whose slots do not begin after this one.
  int64_t low = 0, high = batch.sequences.count;
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    if (first_slot(batch.sequences, middle) <= blockIdx.x)
      low = middle + 1;
    else
      high = middle;
  }
  LongBlock block = {};
  if (low == 0 || !batch.usable()) return block;
  block.slot = blockIdx.x;
  block.sequence = low - 1;
  block.begin = batch.sequences.start(block.sequence);
  block.end = batch.sequences.start(block.sequence + 1);
  block.index = block.slot - first_slot(batch.sequences, block.sequence);
  block.start = block.begin + block.index * kScanBlock;
  block.exists = block.end - block.begin > longest && block.start < block.end;
  return block;
}

// Behind a block: the value passed to it; and what its tokens do to a y behind them.
struct BlockSummary {
  PassedValue value;
  Composite all;
};

// Block i: slot i.
template <int kKind, bool kVector>
__global__ void __launch_bounds__(kScanThreads)
    recurrence_reduce_kernel(RecurrenceBatch batch, int64_t longest, BlockSummary* summaries) {
  const LongBlock block = long_block(batch, longest);
  if (!block.exists) return;
  Behind behind = behind_sequence<kKind>(batch.bootstrap(block.sequence));
  if (kKind != kDiscountedReturns) {
    // The first token behind the block that is scored or ends an episode; most often among the very next.
    int64_t first = block.end;
    for (int64_t next = block.start + kScanBlock; next < block.end && first == block.end; next += kScanThreads) {
      const int64_t token = next + threadIdx.x;
      const bool known = token < block.end &&
                         (batch.mask == nullptr || batch.mask[token] || (batch.dones != nullptr && batch.dones[token]));
      first = block_reduce(known ? token : block.end, [](int64_t a, int64_t b) { return a < b ? a : b; });
    }
    if (first < block.end) behind.value.value = batch.mask == nullptr || batch.mask[first] ? batch.values[first] : 0.0f;
  }
  const PassedValue passed = behind.value;
  const Terms terms =
      scan_values<kKind>(batch, load_tokens<kKind, kVector>(batch, block.start, block.end), behind.value);
  Composite all = {1.0, 0.0f};
  scan_back(terms.all, all);
  if (threadIdx.x == 0) summaries[block.slot] = {passed, all};
}

// Block i: slot i. sums [slots] may be null.
template <int kKind, bool kVector>
__global__ void __launch_bounds__(kScanThreads)
    recurrence_apply_kernel(RecurrenceBatch batch, int64_t longest, const BlockSummary* summaries,
                            AdvantageSums* sums) {
  const LongBlock block = long_block(batch, longest);
  AdvantageSums* const block_sums = sums != nullptr ? sums + blockIdx.x : nullptr;
  if (!block.exists) return store_sums({}, block_sums);
  Behind behind = behind_sequence<kKind>(batch.bootstrap(block.sequence));
  // The blocks behind this one, from the end of the sequence, as many at once as there are threads.
  const int64_t blocks = (block.end - block.begin + kScanBlock - 1) / kScanBlock;
  for (int64_t group = (blocks - 1) / kScanThreads; group >= (block.index + 1) / kScanThreads; --group) {
    const int64_t other = group * kScanThreads + threadIdx.x;
    const bool follows = other > block.index && other < blocks;
    scan_back(follows ? summaries[block.slot - block.index + other].all : Composite{1.0, 0.0f}, behind.y);
  }
  behind.value = summaries[block.slot].value;
  store_sums(scan_block<kKind, kVector>(batch, load_tokens<kKind, kVector>(batch, block.start, block.end), block.start,
                                        block.end, behind),
             block_sums);
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

// A thread per kScanTokens tokens.
template <bool kVector>
__global__ void whiten_advantages_kernel(RecurrenceBatch batch, const Moments* moments) {
  const int64_t first = (int64_t{blockIdx.x} * blockDim.x + threadIdx.x) * kScanTokens, end = batch.sequences.tokens;
  float advantages[kScanTokens] = {};
  bool scored[kScanTokens] = {};
  load_tokens<kVector, float>(batch.advantages, first, end, advantages);
  if (batch.mask != nullptr) load_tokens<kVector>(batch.mask, first, end, scored);
  const Moments m = *moments;
  const float invalid = batch.usable() ? 0.0f : kNan;
#pragma unroll
  for (int i = 0; i < kScanTokens; ++i) {
    const bool counts = m.several != 0 && (batch.mask == nullptr || scored[i]);
    advantages[i] = (counts ? whiten_advantage(m.whitening, advantages[i]) : 0.0f) + invalid;
  }
  store_tokens<kVector>(batch.advantages, first, end, advantages);
}

}  // namespace rlk
