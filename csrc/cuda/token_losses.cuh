// What the kernels of the losses over tokens share: sums over blocks of tokens, which one block then adds up.
#pragma once

#include "inputs.cuh"
#include "launch.h"
#include "rlkernels/aggregation.h"
#include "rlkernels/sequences.h"

namespace rlk {

// A block of threads goes through tiles of tokens, a run for each thread, and then through those that lie one grid
// further. As few blocks as one block can add up at once, and enough for every GPU.
constexpr int kTokenThreads = 128;
constexpr int kTile = kTokenThreads * kRun;
constexpr int64_t kMostBlocks = 1024;
constexpr int kSequenceThreads = 128;
constexpr int kFinishThreads = kWarp * kMaxWarps;
static_assert(kMostBlocks <= kFinishThreads);

inline int64_t token_blocks(int64_t tokens) {
  const int64_t tiles = divide_up(tokens, kTile);
  return tiles < kMostBlocks ? tiles : kMostBlocks;
}

__device__ inline bool is_scored(Flags mask, int64_t token) {
  return mask.data == nullptr || element<false>(mask, token);
}

// The sequences of the tokens of a run, of sequences of one length and fewer than 2^31 tokens: one short division.
__device__ inline void rows_of_run(const Sequences& sequences, unsigned first, unsigned (&of)[kRun]) {
  const unsigned length = static_cast<unsigned>(sequences.length);
  unsigned row = first / length, within = first - row * length;
#pragma unroll
  for (int i = 0; i < kRun; ++i) {
    of[i] = row;
    const bool ends = ++within == length;
    row += ends;
    within = ends ? 0 : within;
  }
}

// The sequences of the tokens of a run: one division or search, and then a look at where the next ones begin. That of a
// token may lie beyond the last one where cu_seqlens are wrong.
__device__ inline void sequences_of_run(const Sequences& sequences, int64_t first, int64_t (&of)[kRun]) {
  int64_t s = sequences.of(first);
  int64_t next = s < sequences.count ? sequences.start(s + 1) : INT64_MAX;
#pragma unroll
  for (int i = 0; i < kRun; ++i) {
    while (first + i >= next) next = ++s < sequences.count ? sequences.start(s + 1) : INT64_MAX;
    of[i] = s;
  }
}

// What one block ends a loss with.
struct LossEnd {
  Denominator denominator;
  Floats normalizer;   // a tensor's, or null
  const float* valid;  // NaN where cu_seqlens are wrong; null without them
  float *loss, *scale;

  // By one thread: divides the sum of the losses, 0 where nothing is scored. The scale is what the gradients are yet to
  // be multiplied by.
  __device__ void divide(double sum, double tokens, double sequences) const {
    Denominator known = denominator;
    if (normalizer.data != nullptr) known.normalizer = number(normalizer);
    const double divisor = known(tokens, sequences), factor = valid != nullptr ? *valid : 1.0;
    *loss = static_cast<float>((tokens > 0.0 ? sum / divisor : 0.0) * factor);
    *scale = static_cast<float>((tokens > 0.0 ? 1.0 / divisor : 0.0) * factor);
  }
};

}  // namespace rlk
