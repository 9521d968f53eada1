// token_logprobs: what its kernels are launched with.
#pragma once

#include "launch.h"

namespace rlk {

enum class DType { kFloat32, kBFloat16, kFloat16 };

// Row r starts at element (r / inner) * outer_stride + (r % inner) * inner_stride.
struct LogitRows {
  int64_t inner, outer_stride, inner_stride;
  int vocab;

  __device__ int64_t start(int64_t row) const { return row / inner * outer_stride + row % inner * inner_stride; }
};

// `count` rows of logits, or of their gradient.
struct Logits {
  void* data;
  DType dtype;
  LogitRows rows;
  int64_t count;
};

// max and log_sum of each row, for the backward pass: row_stats [2, rows].
struct RowStats {
  float *max, *log_sum;
};

struct LogprobOptions {
  float temperature, softcap;
  int64_t ignore_index;
};

// entropy may be null.
void launch_token_logprobs_forward(const Launcher& launch, const Logits& logits, const int64_t* token_ids,
                                   const LogprobOptions& options, float* logprobs, float* entropy, RowStats stats);
// grad_logprobs and grad_entropy may be null, and entropy where grad_entropy is. `gradient` may be `logits`.
void launch_token_logprobs_backward(const Launcher& launch, const float* grad_logprobs, const float* grad_entropy,
                                    const Logits& logits, const int64_t* token_ids, const float* logprobs,
                                    const float* entropy, RowStats stats, const LogprobOptions& options,
                                    const Logits& gradient);

}  // namespace rlk
