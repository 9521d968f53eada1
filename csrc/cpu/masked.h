#pragma once

#include <algorithm>

#include "kernels.h"
#include "rlkernels/masked.h"

namespace rlk {

// `rows` rows of `length` elements, in blocks of a fixed size, so that sums are the same whatever the number of
// threads.
struct Masked {
  const float* x;    // [rows, length]
  const bool* mask;  // the same, or null: every element is scored
  int64_t rows, length;

  static constexpr int64_t kBlock = 1024;
  int64_t blocks_per_row() const { return (length + kBlock - 1) / kBlock; }
  int64_t blocks() const { return rows * blocks_per_row(); }
  // Block b, which lies in row b / blocks_per_row(), holds the elements [begin(b), end(b)).
  int64_t begin(int64_t b) const { return b / blocks_per_row() * length + b % blocks_per_row() * kBlock; }
  int64_t end(int64_t b) const { return std::min(begin(b) + kBlock, (b / blocks_per_row() + 1) * length); }
};

struct MaskedSum {
  double count, sum;
};

template <Isa>
struct MaskedKernels {
  // Blocks [begin, end).
  static void masked_sums(const Masked& problem, MaskedSum* sums, int64_t begin, int64_t end);
  static void masked_moments(const Masked& problem, Moments* moments, int64_t begin, int64_t end);
  // Elements [begin, end).
  static void masked_whiten(const Masked& problem, const Whitening& whitening, float* whitened, int64_t begin,
                            int64_t end);
};

}  // namespace rlk
