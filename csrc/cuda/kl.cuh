// kl_penalty: elementwise, 16 bytes at a time. shaped_rewards: the same, and a look ahead over the mask.
#pragma once

#include "block.cuh"
#include "kl.h"
#include "rlkernels/kl.h"

namespace rlk {

// `count` elements. The first 4 * vectors are read and written as vectors: all but the last few, or none where an
// address is not aligned.
struct Elements {
  int64_t count, vectors;
};

__global__ void kl_penalty_forward_kernel(const float* __restrict__ logprobs, const float* __restrict__ ref_logprobs,
                                          float* __restrict__ penalty, Elements elements, KlOptions o) {
  const auto f = [&](float p, float q) { return kl_penalty(o.estimator, p, q, o.log_ratio_clamp, o.value_clamp); };
  const int64_t thread = int64_t{blockIdx.x} * blockDim.x + threadIdx.x, threads = int64_t{gridDim.x} * blockDim.x;
  for (int64_t i = thread; i < elements.vectors; i += threads) {
    const float4 p = reinterpret_cast<const float4*>(logprobs)[i];
    const float4 q = reinterpret_cast<const float4*>(ref_logprobs)[i];
    reinterpret_cast<float4*>(penalty)[i] = make_float4(f(p.x, q.x), f(p.y, q.y), f(p.z, q.z), f(p.w, q.w));
  }
  for (int64_t i = 4 * elements.vectors + thread; i < elements.count; i += threads)
    penalty[i] = f(logprobs[i], ref_logprobs[i]);
}

__global__ void kl_penalty_backward_kernel(const float* __restrict__ grad, const float* __restrict__ logprobs,
                                           const float* __restrict__ ref_logprobs, float* __restrict__ grad_logprobs,
                                           Elements elements, KlOptions o) {
  const auto f = [&](float g, float p, float q) {
    return g * kl_penalty_derivative(o.estimator, o.straight_through, p, q, o.log_ratio_clamp, o.value_clamp);
  };
  const int64_t thread = int64_t{blockIdx.x} * blockDim.x + threadIdx.x, threads = int64_t{gridDim.x} * blockDim.x;
  for (int64_t i = thread; i < elements.vectors; i += threads) {
    const float4 g = reinterpret_cast<const float4*>(grad)[i];
    const float4 p = reinterpret_cast<const float4*>(logprobs)[i];
    const float4 q = reinterpret_cast<const float4*>(ref_logprobs)[i];
    reinterpret_cast<float4*>(grad_logprobs)[i] =
        make_float4(f(g.x, p.x, q.x), f(g.y, p.y, q.y), f(g.z, p.z, q.z), f(g.w, p.w, q.w));
  }
  for (int64_t i = 4 * elements.vectors + thread; i < elements.count; i += threads)
    grad_logprobs[i] = f(grad[i], logprobs[i], ref_logprobs[i]);
}

constexpr int kRewardThreads = 256;
constexpr int kThreadTokens = 4;
constexpr int kRewardTokens = kRewardThreads * kThreadTokens;
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

// Block b: tokens [b * kRewardTokens, (b + 1) * kRewardTokens), kThreadTokens to a thread. Which token is the last that
// is scored in its sequence the block sees by itself, but for the sequence that goes on beyond it, whose mask it reads
// up to the next scored token. Only a block with a scored token asks, and its answer lies before the next such block:
// the mask is read twice, no more.
__global__ void __launch_bounds__(kRewardThreads) shaped_rewards_kernel(RewardBatch batch, float* rewards) {
  __shared__ unsigned scored_bits[kRewardTokens / 32];
  __shared__ int64_t limit;  // where the sequence of the block's last token ends
  const Sequences& sequences = batch.sequences;
  const int64_t first = int64_t{blockIdx.x} * kRewardTokens;
  const int64_t block_end = first + kRewardTokens < sequences.tokens ? first + kRewardTokens : sequences.tokens;
  const int offset = static_cast<int>(threadIdx.x) * kThreadTokens;
  const int64_t token = first + offset;
  const bool whole = batch.aligned && token + kThreadTokens <= sequences.tokens;

  bool scored[1 + kThreadTokens] = {};  // of the token before the thread's, where that matters, and of those
  if (batch.after_last && token > 0 && token < sequences.tokens) scored[0] = batch.scored(token - 1);
  if (whole && batch.mask != nullptr) {
    const uint32_t four = *reinterpret_cast<const uint32_t*>(batch.mask + token);
#pragma unroll
    for (int i = 0; i < kThreadTokens; ++i) scored[1 + i] = (four >> 8 * i & 0xff) != 0;
  } else {
#pragma unroll
    for (int i = 0; i < kThreadTokens; ++i) scored[1 + i] = token + i < sequences.tokens && batch.scored(token + i);
  }
  unsigned bits = 0;
#pragma unroll
  for (int i = 0; i < kThreadTokens; ++i) bits |= static_cast<unsigned>(scored[1 + i]) << (offset % 32 + i);
#pragma unroll
  for (int lanes = 1; lanes < 32 / kThreadTokens; lanes *= 2) bits |= shuffle_xor(bits, lanes);
  if (offset % 32 == 0) scored_bits[offset / 32] = bits;
  int64_t s = sequences.of(token + kThreadTokens < block_end ? token + kThreadTokens - 1 : block_end - 1);
  if (threadIdx.x == kRewardThreads - 1) limit = s < sequences.count ? sequences.start(s + 1) : block_end;
  __syncthreads();

  bool later = batch.mask == nullptr;
  if (batch.mask != nullptr && block_end < limit) {
    // The token after the last one may bear its score.
    const bool asks =
        next_bit(scored_bits, 0) < kRewardTokens || (batch.after_last && first > 0 && batch.mask[first - 1]);
    int64_t look = kFirstLook;
    for (int64_t from = block_end; asks && !later && from < limit; from += look, look = kLongestLook) {
      int found = 0;
      for (int64_t t = from + threadIdx.x; t < from + look && t < limit; t += kRewardThreads) found |= batch.mask[t];
      later = block_reduce(found, [](int a, int b) { return a | b; }) != 0;
    }
  }

  float p[kThreadTokens], q[kThreadTokens], reward[kThreadTokens];
  if (whole) {
    unpack<float>(load_vector(batch.logprobs + token, true), p);
    unpack<float>(load_vector(batch.ref_logprobs + token, true), q);
  } else {
#pragma unroll
    for (int i = 0; i < kThreadTokens; ++i) {
      p[i] = scored[1 + i] ? batch.logprobs[token + i] : 0.0f;
      q[i] = scored[1 + i] ? batch.ref_logprobs[token + i] : 0.0f;
    }
  }
#pragma unroll
  for (int i = 0; i < kThreadTokens; ++i)
    reward[i] = select(scored[1 + i], kl_reward(batch.estimator, p[i], q[i], batch.kl_coef), 0.0f);

  const float valid = batch.valid != nullptr ? *batch.valid : 1.0f;
  const int next_in_block = next_bit(scored_bits, offset + kThreadTokens);
  // The first scored token after the one in turn, as far as it matters: block_end stands for those beyond.
  int64_t next = next_in_block < kRewardTokens ? first + next_in_block : later ? block_end : sequences.tokens;
#pragma unroll
  for (int i = kThreadTokens - 1; i >= 0; --i) {
    const int64_t t = token + i;
    while (s > 0 && sequences.start(s) > t) --s;
    const int64_t end = sequences.start(s < sequences.count ? s + 1 : s);
    const bool after = !scored[1 + i] & scored[i] & (t > sequences.start(s));
    const bool last = batch.after_last ? after | (scored[1 + i] & (t + 1 == end)) : scored[1 + i];
    if (last & (next >= end) & (s < sequences.count)) reward[i] += batch.scores[s];
    if (scored[1 + i]) next = t;
    reward[i] *= valid;
  }
  if (whole) {
    store_vector<float>(rewards + token, reward);
  } else {
#pragma unroll
    for (int i = 0; i < kThreadTokens; ++i)
      if (token + i < sequences.tokens) rewards[token + i] = reward[i];
  }
}

}  // namespace rlk
