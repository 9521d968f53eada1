#pragma once

#include "kernels.h"

namespace rlk {

enum class DType { kFloat32, kBFloat16, kFloat16 };

// Row r of [rows, vocab] starts at element (r / inner) * outer_stride + (r % inner) * inner_stride.
struct LogitRows {
  void* data;
  DType dtype;
  int64_t rows, inner, vocab;
  int64_t outer_stride, inner_stride;
};

struct TokenLogprobs {
  LogitRows logits;
  const int64_t* token_ids;  // [rows]
  float temperature, softcap;
  int64_t ignore_index;
  int64_t vocab_start = 0;  // the token of the first logit, where the logits are a tile of wider rows

  bool ignored(int64_t row) const { return token_ids[row] == ignore_index; }
  // Among the row's logits; -1 where the target is in another tile.
  int64_t target(int64_t row) const {
    const int64_t id = token_ids[row];
    return vocab_start <= id && id - vocab_start < logits.vocab ? id - vocab_start : -1;
  }

  // Rows are worked on in blocks of this many logits: so few that a block's second reading comes from the L1 cache, and
  // cut at the same places whatever the number of threads.
  static constexpr int64_t kBlock = 4096;
  int64_t blocks_per_row() const { return (logits.vocab + kBlock - 1) / kBlock; }
};

// Over a block's logits but the target: m = max x, s = sum exp((x - m) / temperature), w = sum of the same terms, each
// times (x - m) / temperature.
struct BlockSums {
  float m, s, w;
};

template <Isa>
struct LogprobsKernels {
  // Blocks [begin, end), counted row by row.
  static void token_logprobs_sums(const TokenLogprobs& problem, bool with_entropy, BlockSums* sums, int64_t begin,
                                  int64_t end);
  // Rows [begin, end). parts is [4, rows]: max, sum and moment over the row's logits but the target's, and the
  // target's.
  static void token_logprobs_part(const TokenLogprobs& problem, bool with_entropy, const BlockSums* sums, float* parts,
                                  int64_t begin, int64_t end);
  // Rows [begin, end). entropy may be null; row_stats is [2, rows].
  static void token_logprobs_finish(const TokenLogprobs& problem, const BlockSums* sums, float* logprobs,
                                    float* entropy, float* row_stats, int64_t begin, int64_t end);
  // Blocks [begin, end). Either gradient may be null; `gradient`, of the logits' dtype, may be the logits themselves.
  static void token_logprobs_backward(const TokenLogprobs& problem, const float* grad_logprobs,
                                      const float* grad_entropy, const float* logprobs, const float* entropy,
                                      const float* row_stats, const LogitRows& gradient, int64_t begin, int64_t end);
};

}  // namespace rlk
