// kl_penalty: elementwise, 16 bytes at a time. shaped_rewards: the same, and a look ahead over the mask.
#pragma once

#include "inputs.cuh"
#include "kl.h"
#include "rlkernels/kl.h"

namespace rlk {

constexpr int kElementThreads = 256;

// A thread's run of the elements.
__device__ inline Range block_of_elements(int64_t count) {
  const int64_t start = int64_t{blockIdx.x} * kElementThreads * kRun, left = count - start;
  return {start, 0, left < kElementThreads * kRun ? static_cast<int>(left) : kElementThreads * kRun};
}

template <bool kPlain>
__global__ void __launch_bounds__(kElementThreads)
    kl_penalty_forward_kernel(Floats logprobs, Floats ref_logprobs, float* penalty, int64_t count, KlOptions o) {
  const Range range = block_of_elements(count);
  const int first = threadIdx.x * kRun;
  float p[kRun], q[kRun];
  load_run<kPlain>(logprobs, range, first, p);
  load_run<kPlain>(ref_logprobs, range, first, q);
#pragma unroll
  for (int i = 0; i < kRun; ++i) p[i] = kl_penalty(o.estimator, p[i], q[i], o.log_ratio_clamp, o.value_clamp);
  store_run<kPlain>(penalty, range, first, p);
}

// kPlain: the gradients too are float.
template <bool kPlain>
__global__ void __launch_bounds__(kElementThreads)
    kl_penalty_backward_kernel(Floats grad, Floats logprobs, Floats ref_logprobs, FloatsOut grad_logprobs,
                               FloatsOut grad_ref, int64_t count, KlOptions o) {
  const Range range = block_of_elements(count);
  const int first = threadIdx.x * kRun;
  float g[kRun], p[kRun], q[kRun];
  load_run<kPlain>(grad, range, first, g);
  load_run<kPlain>(logprobs, range, first, p);
  load_run<kPlain>(ref_logprobs, range, first, q);
#pragma unroll
  for (int i = 0; i < kRun; ++i)
    g[i] *= kl_penalty_derivative(o.estimator, o.straight_through, p[i], q[i], o.log_ratio_clamp, o.value_clamp);
  store_run<kPlain>(grad_logprobs, range, first, g);
  if (grad_ref.data == nullptr) return;
#pragma unroll
  for (float& value : g) value = -value;
  store_run<kPlain>(grad_ref, range, first, g);
}

constexpr int kRewardThreads = 256;
constexpr int kRewardTokens = kRewardThreads * kRun;
// The mask beyond a block is read in steps: few bytes first, since a sequence mostly goes on there.
constexpr int64_t kFirstLook = kRewardThreads, kLongestLook = 64 * kRewardThreads;

// The position of the first bit that is set at or after `from`; kRewardTokens if none is.
__device__ inline int next_bit(const unsigned* words, int from) {
  // Most threads find it in the first word.
#pragma unroll 1
  for (int word = from / 32; word < kRewardTokens / 32; ++word) {
    const unsigned bits = word == from / 32 ? words[word] & ~0u << from % 32 : words[word];
    if (bits != 0) return word * 32 + __ffs(static_cast<int>(bits)) - 1;
  }
  return kRewardTokens;
}

// Block b: tokens [b * kRewardTokens, (b + 1) * kRewardTokens), kRun to a thread. Which token is the last that
// is scored in its sequence the block sees by itself, but for the sequence that goes on beyond it, whose mask it reads
// up to the next scored token. Only a block with a scored token asks, and its answer lies before the next such block:
// the mask is read twice, no more.
template <bool kPlain>
__global__ void __launch_bounds__(kRewardThreads) shaped_rewards_kernel(RewardBatch batch, float* rewards) {
  __shared__ unsigned scored_bits[kRewardTokens / 32];
  __shared__ int64_t limit;  // where the sequence of the block's last token ends
  const Sequences& sequences = batch.sequences;
  const int64_t first = int64_t{blockIdx.x} * kRewardTokens;
  const int64_t block_end = first + kRewardTokens < sequences.tokens ? first + kRewardTokens : sequences.tokens;
  const int offset = static_cast<int>(threadIdx.x) * kRun;
  const int64_t token = first + offset;
  const Range range = {first, 0, static_cast<int>(block_end - first)};

  bool scored[1 + kRun] = {};  // of the token before the thread's, where that matters, and of those
  if (batch.after_last && token > 0 && token < sequences.tokens)
    scored[0] = batch.mask.data == nullptr || element<kPlain>(batch.mask, token - 1);
  const FlagRun run = load_run<kPlain>(batch.mask, range, offset);
#pragma unroll
  for (int i = 0; i < kRun; ++i) scored[1 + i] = run[i];
  unsigned bits = 0;
#pragma unroll
  for (int i = 0; i < kRun; ++i) bits |= static_cast<unsigned>(scored[1 + i]) << (offset % 32 + i);
#pragma unroll
  for (int lanes = 1; lanes < 32 / kRun; lanes *= 2) bits |= shuffle_xor(bits, lanes);
  if (offset % 32 == 0) scored_bits[offset / 32] = bits;
  int64_t s = sequences.of(token + kRun < block_end ? token + kRun - 1 : block_end - 1);
  if (threadIdx.x == kRewardThreads - 1) limit = s < sequences.count ? sequences.start(s + 1) : block_end;
  __syncthreads();

  bool later = batch.mask.data == nullptr;
  if (batch.mask.data != nullptr && block_end < limit) {
    // The token after the last one may bear its score.
    const bool asks = next_bit(scored_bits, 0) < kRewardTokens ||
                      (batch.after_last && first > 0 && element<kPlain>(batch.mask, first - 1));
    int64_t look = kFirstLook;
    for (int64_t from = block_end; asks && !later && from < limit; from += look, look = kLongestLook) {
      int found = 0;
      for (int64_t t = from + threadIdx.x; t < from + look && t < limit; t += kRewardThreads)
        found |= element<kPlain>(batch.mask, t);
      later = block_reduce(found, [](int a, int b) { return a | b; }) != 0;
    }
  }

  float p[kRun], q[kRun], reward[kRun];
  load_run<kPlain>(batch.logprobs, range, offset, p);
  load_run<kPlain>(batch.ref_logprobs, range, offset, q);
#pragma unroll
  for (int i = 0; i < kRun; ++i)
    reward[i] = select(scored[1 + i], kl_reward(batch.estimator, p[i], q[i], batch.kl_coef), 0.0f);

  const float valid = batch.valid != nullptr ? *batch.valid : 1.0f;
  const int next_in_block = next_bit(scored_bits, offset + kRun);
  // The first scored token after the one in turn, as far as it matters: block_end stands for those beyond.
  int64_t next = next_in_block < kRewardTokens ? first + next_in_block : later ? block_end : sequences.tokens;
#pragma unroll
  for (int i = kRun - 1; i >= 0; --i) {
    const int64_t t = token + i;
    while (s > 0 && sequences.start(s) > t) --s;
    const int64_t end = sequences.start(s < sequences.count ? s + 1 : s);
    const bool after = !scored[1 + i] & scored[i] & (t > sequences.start(s));
    const bool last = batch.after_last ? after | (scored[1 + i] & (t + 1 == end)) : scored[1 + i];
    if (last & (next >= end) & (s < sequences.count)) reward[i] += element<kPlain>(batch.scores, s);
    if (scored[1 + i]) next = t;
    reward[i] *= valid;
  }
  store_run<kPlain>(rewards, range, offset, reward);
}

}  // namespace rlk
