#pragma once

// The CPU kernels on raw pointers. Every function is compiled once per instruction set (see setup.py) as a member of
// Kernels<that set>; bindings.cpp chooses one at run time. Functions with begin and end do that part of the work, so
// that the caller can spread it over threads; where it is cut never changes a result.

#include <cstdint>

#include "rlkernels/policy_loss.h"

namespace rlk {

enum class Isa { kBaseline, kAvx2, kAvx512 };

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

struct KlPenalty {
  int estimator;
  bool straight_through;
  float log_ratio_clamp, value_clamp;
};

struct GroupAdvantages {
  const float* rewards;  // [rows, columns]
  const float* weights;  // [columns], or null: all 1
  const int64_t* order;  // [rows] and offsets [rows + 1], or both null: groups of `group_size` consecutive rows
  const int64_t* offsets;
  int64_t rows, columns, group_size;
  int baseline, scale;
  float eps;
  bool normalize_before_sum, keep_singleton;
};

struct PolicyLoss {
  const float* logprobs;      // [tokens], as are old_logprobs, ref_logprobs and mask
  const float* old_logprobs;  // or null: logprobs
  const float* ref_logprobs;  // or null
  const bool* mask;           // or null: every token is scored
  const float* advantages;    // [tokens] or [sequences]
  bool advantage_per_token;
  const int32_t* cu_seqlens;  // [sequences + 1], or null: sequences of sequence_length tokens
  int64_t tokens, sequences, sequence_length;
  bool mean_over_sequence;  // divide a token's loss by the number of scored tokens in its sequence
  PolicyOptions options;

  int64_t sequence_start(int64_t s) const { return cu_seqlens != nullptr ? cu_seqlens[s] : s * sequence_length; }

  // Tokens per partial sum: fixed, so that the sum is the same whatever the number of threads.
  static constexpr int64_t kBlock = 1024;
  int64_t blocks() const { return (tokens + kBlock - 1) / kBlock; }
};

// Over the scored tokens of a block: the loss, and what policy_loss.metrics averages, in its order.
struct PolicySums {
  double loss, metrics[kNumTokens];
};

template <Isa>
struct Kernels {
  // Blocks [begin, end), counted row by row.
  static void token_logprobs_sums(const TokenLogprobs& problem, bool with_entropy, BlockSums* sums, int64_t begin,
                                  int64_t end);
  // Rows [begin, end). entropy may be null; row_stats is [2, rows].
  static void token_logprobs_finish(const TokenLogprobs& problem, const BlockSums* sums, float* logprobs,
                                    float* entropy, float* row_stats, int64_t begin, int64_t end);
  // Blocks [begin, end). Either gradient may be null; `gradient` may be the logits themselves.
  static void token_logprobs_backward(const TokenLogprobs& problem, const float* grad_logprobs,
                                      const float* grad_entropy, const float* logprobs, const float* entropy,
                                      const float* row_stats, const LogitRows& gradient, int64_t begin, int64_t end);

  // Elements [begin, end).
  static void kl_penalty_forward(const KlPenalty& options, const float* logprobs, const float* ref_logprobs,
                                 float* penalty, int64_t begin, int64_t end);
  static void kl_penalty_backward(const KlPenalty& options, const float* grad, const float* logprobs,
                                  const float* ref_logprobs, float* grad_logprobs, int64_t begin, int64_t end);

  static void group_advantages(const GroupAdvantages& problem, float* advantages, bool* signal);

  // Sequences [begin, end): how many of their tokens are scored.
  static void policy_loss_lengths(const PolicyLoss& problem, int64_t* lengths, int64_t begin, int64_t end);
  // Blocks [begin, end). `gradient` [tokens] is by logprobs, before the division by the loss's denominator.
  static void policy_loss_sums(const PolicyLoss& problem, const int64_t* lengths, PolicySums* sums, float* gradient,
                               int64_t begin, int64_t end);
};

}  // namespace rlk
