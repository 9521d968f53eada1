#include "rlkernels/logprobs.h"

#include <algorithm>
#include <cmath>

#include "logit_rows.h"

namespace rlk {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kNan = std::numeric_limits<float>::quiet_NaN();

// Vectors taken at once by the summing loop, so that additions do not wait for each other.
constexpr int kUnroll = 4;
constexpr int64_t kChunk = kUnroll * kLanes;
constexpr int64_t kCacheLine = 64;
// How far ahead the gradient's loop asks for logits: what arrives in the time a reading from memory takes.
constexpr int64_t kPrefetchBytes = 2048;
static_assert(TokenLogprobs::kBlock % kChunk == 0);

float to_float(float x) { return x; }
float to_float(BFloat16 x) { return load(&x, 1).lanes[0]; }
float to_float(Float16 x) { return load(&x, 1).lanes[0]; }

template <typename T>
T from_float(float x) {
  T element;
  store(&element, Vec(x), 1);
  return element;
}

// By the arithmetic of vectors, so that the logits that loops subtract this from are equal where they are the same.
float capped(float x, const TokenLogprobs& problem) {
  return first(scaled_logit(Vec(x), Vec(problem.softcap), Vec(1.0f), problem.softcap > 0));
}

// What a row's gradient needs besides its logits: log p = (x - origin) / temperature - log_sum, of the capped x. Both
// gradients are already divided by the temperature.
struct RowGradient {
  float grad_logprob, grad_entropy, entropy, origin, log_sum;
};

// A block without its target, as whole chunks. The chunk with the target and the ragged end of the row are copied and
// capped, and hold -inf where there is nothing to add.
template <typename T>
class Block {
 public:
  Block(const T* block, int64_t size, int64_t target, const TokenLogprobs& problem) {
    const int64_t whole = size / kChunk * kChunk;
    const bool has_target = 0 <= target && target < size;
    const int64_t target_chunk = has_target ? target / kChunk * kChunk : whole;
    runs_[0] = {block, std::min(target_chunk, whole)};
    if (target_chunk < whole) {
      runs_[1] = {block + target_chunk + kChunk, whole - target_chunk - kChunk};
      add_edge(block + target_chunk, kChunk, target - target_chunk, problem);
    }
    if (whole < size) add_edge(block + whole, size - whole, has_target ? target - whole : -1, problem);
  }

  // Calls function(start, size, capped) for the parts: start has the type of the logits, or is of floats that are
  // capped already.
  template <typename Function>
  void for_each_part(Function function) const {
    for (const Run& run : runs_) function(run.start, run.size, false);
    function(edges_, edges_size_, true);
  }

 private:
  struct Run {
    const T* start = nullptr;
    int64_t size = 0;
  };

  void add_edge(const T* x, int64_t size, int64_t target, const TokenLogprobs& problem) {
    float* const edge = edges_ + edges_size_;
    for_each_vector(0, size, [&](int64_t i, int64_t count) {
      store(edge + i, scaled_logit(load(x + i, count), Vec(problem.softcap), Vec(1.0f), problem.softcap > 0));
    });
    std::fill(edge + size, edge + kChunk, -kInfinity);
    if (0 <= target && target < size) edge[target] = -kInfinity;
    edges_size_ += kChunk;
  }

  Run runs_[2];
  float edges_[2 * kChunk];
  int64_t edges_size_ = 0;
};

template <typename T>
float largest(const T* x, int64_t size) {
  Vec m[kUnroll] = {-kInfinity, -kInfinity, -kInfinity, -kInfinity};
  for (int64_t i = 0; i < size; i += kChunk)
    for (int u = 0; u < kUnroll; ++u) m[u] = max(m[u], load(x + i + u * kLanes));
  return horizontal_max(max(max(m[0], m[1]), max(m[2], m[3])));
}

template <bool kCapped, bool kEntropy, typename T>
BlockSums block_sums(const Block<T>& block, const TokenLogprobs& problem) {
  const Vec softcap = problem.softcap, inverse_temperature = 1.0f / problem.temperature;
  float m = -kInfinity;
  block.for_each_part([&](const auto* x, int64_t size, bool capped_already) {
    // The cap preserves order.
    if (size > 0) m = std::max(m, capped_already ? largest(x, size) : capped(largest(x, size), problem));
  });
  const Vec origin = m == -kInfinity ? 0.0f : m;  // -inf - -inf would be NaN
  Vec s[kUnroll] = {0.0f, 0.0f, 0.0f, 0.0f}, w[kUnroll] = {0.0f, 0.0f, 0.0f, 0.0f};
  block.for_each_part([&](const auto* x, int64_t size, bool capped_already) {
    for (int64_t i = 0; i < size; i += kChunk) {
      for (int64_t line = 0; line < kChunk; line += kCacheLine / sizeof(*x))
        prefetch<2>(x + i, TokenLogprobs::kBlock + line);  // the next block, in L2: L1 can await too few lines at once
      for (int u = 0; u < kUnroll; ++u) {
        const Vec z = scaled_logit(load(x + i + u * kLanes), softcap, Vec(1.0f), kCapped && !capped_already);
        const Vec d = (z - origin) * inverse_temperature;
        const Vec e = exp(d);
        s[u] += e;
        if constexpr (kEntropy) w[u] += select(e == Vec(0.0f), Vec(0.0f), e * d);
      }
    }
  });
  return {m, horizontal_sum((s[0] + s[1]) + (s[2] + s[3])), horizontal_sum((w[0] + w[1]) + (w[2] + w[3]))};
}

float largest_of(const TokenLogprobs& problem, const BlockSums* sums, int64_t row) {
  const BlockSums* const blocks = sums + row * problem.blocks_per_row();
  float largest = -kInfinity;
  for (int64_t b = 0; b < problem.blocks_per_row(); ++b) largest = std::max(largest, blocks[b].m);
  return largest;
}

RowSums<float> sums_relative_to(const TokenLogprobs& problem, const BlockSums* sums, int64_t row, float origin) {
  const BlockSums* const blocks = sums + row * problem.blocks_per_row();
  const float inverse_temperature = 1.0f / problem.temperature;
  RowSums<float> others = {-kInfinity, 0.0f, 0.0f};
  for (int64_t b = 0; b < problem.blocks_per_row(); ++b)
    others = merge(others, {(blocks[b].m - origin) * inverse_temperature, blocks[b].s, blocks[b].w});
  return others;
}

// The gradient of elements [0, size) of a block, as if none of them were the target. x may be where it is written.
template <bool kCapped, bool kEntropy, typename T>
void block_gradient(const T* x, T* gradient, int64_t size, const TokenLogprobs& problem, RowGradient row) {
  const Vec softcap = problem.softcap, inverse_temperature = 1.0f / problem.temperature;
  const auto gradient_of = [&](Vec x) {
    const Vec z = scaled_logit(x, softcap, Vec(1.0f), kCapped) - Vec(row.origin);
    const Vec log_p = z * inverse_temperature - Vec(row.log_sum);
    const Vec dz = row_gradient(log_p, Vec(row.entropy), Vec(row.grad_logprob), Vec(row.grad_entropy), kEntropy);
    return kCapped ? dz * scaled_logit_derivative(x, softcap, Vec(1.0f), true) : dz;
  };
  for_each_vector(0, size, [&](int64_t i, int64_t count) {
    prefetch<1>(x + i, kPrefetchBytes / static_cast<int64_t>(sizeof(T)));
    store(gradient + i, gradient_of(load(x + i, count)), count);
  });
}

}  // namespace

template <>
void LogprobsKernels<Isa::RLK_ISA>::token_logprobs_sums(const TokenLogprobs& problem, bool with_entropy,
                                                        BlockSums* sums, int64_t begin, int64_t end) {
  const FlushDenormals flush;
  const LogitRows& logits = problem.logits;
  with_element_type(logits.dtype, [&]<typename T>(T) {
    const auto kernel = problem.softcap > 0 ? (with_entropy ? block_sums<true, true, T> : block_sums<true, false, T>)
                                            : (with_entropy ? block_sums<false, true, T> : block_sums<false, false, T>);
    for (int64_t i = begin; i < end; ++i) {
      const int64_t row = i / problem.blocks_per_row();
      const int64_t start = i % problem.blocks_per_row() * TokenLogprobs::kBlock;
      if (problem.ignored(row)) continue;
      const int64_t size = std::min(TokenLogprobs::kBlock, logits.vocab - start);
      const Block<T> block(row_start<const T>(logits, row) + start, size, problem.target(row) - start, problem);
      sums[i] = kernel(block, problem);
    }
  });
}

template <>
void LogprobsKernels<Isa::RLK_ISA>::token_logprobs_part(const TokenLogprobs& problem, bool with_entropy,
                                                        const BlockSums* sums, float* parts, int64_t begin,
                                                        int64_t end) {
  const LogitRows& logits = problem.logits;
  with_element_type(logits.dtype, [&]<typename T>(T) {
    for (int64_t row = begin; row < end; ++row) {
      float origin = -kInfinity, target_logit = kNan;
      RowSums<float> others = {-kInfinity, 0.0f, 0.0f};
      if (!problem.ignored(row)) {
        origin = largest_of(problem, sums, row);
        others = sums_relative_to(problem, sums, row, origin == -kInfinity ? 0.0f : origin);
        // The max passes over a NaN and the sum does not; the two must agree.
        if (others.s != others.s) origin = kNan;
        const int64_t target = problem.target(row);
        if (target >= 0) target_logit = capped(to_float(row_start<const T>(logits, row)[target]), problem);
      }
      parts[row] = origin;
      parts[logits.rows + row] = others.s;
      parts[2 * logits.rows + row] = with_entropy ? others.w : 0.0f;
      parts[3 * logits.rows + row] = target_logit;
    }
  });
}

template <>
void LogprobsKernels<Isa::RLK_ISA>::token_logprobs_finish(const TokenLogprobs& problem, const BlockSums* sums,
                                                          float* logprobs, float* entropy, float* row_stats,
                                                          int64_t begin, int64_t end) {
  const LogitRows& logits = problem.logits;
  const float inverse_temperature = 1.0f / problem.temperature;
  with_element_type(logits.dtype, [&]<typename T>(T) {
    for (int64_t row = begin; row < end; ++row) {
      RowResult<float> result = {0.0f, 0.0f, 0.0f, 0.0f};
      if (!problem.ignored(row)) {
        const float x_target = capped(to_float(row_start<const T>(logits, row)[problem.target(row)]), problem);
        // Differences of logits are exact, or nearly, where logits / temperature would be rounded: the row is finished
        // relative to its largest logit.
        float origin = largest_of(problem, sums, row);
        if (origin == -kInfinity) origin = x_target;
        const RowSums<float> others = sums_relative_to(problem, sums, row, origin);
        result = finish_row(others, (x_target - origin) * inverse_temperature);
        result.max = std::max(origin, x_target);
      }
      logprobs[row] = result.logprob;
      if (entropy != nullptr) entropy[row] = result.entropy;
      row_stats[row] = result.max;
      row_stats[logits.rows + row] = result.log_sum;
    }
  });
}

template <>
void LogprobsKernels<Isa::RLK_ISA>::token_logprobs_backward(const TokenLogprobs& problem, const float* grad_logprobs,
                                                            const float* grad_entropy, const float* logprobs,
                                                            const float* entropy, const float* row_stats,
                                                            const LogitRows& gradient, int64_t begin, int64_t end) {
  const FlushDenormals flush;
  const LogitRows& logits = problem.logits;
  const bool with_entropy = grad_entropy != nullptr;
  with_element_type(logits.dtype, [&]<typename T>(T) {
    const auto kernel = problem.softcap > 0
                            ? (with_entropy ? block_gradient<true, true, T> : block_gradient<true, false, T>)
                            : (with_entropy ? block_gradient<false, true, T> : block_gradient<false, false, T>);
    for (int64_t i = begin; i < end; ++i) {
      const int64_t row = i / problem.blocks_per_row();
      const int64_t start = i % problem.blocks_per_row() * TokenLogprobs::kBlock;
      const int64_t size = std::min(TokenLogprobs::kBlock, logits.vocab - start);
      T* const out = row_start<T>(gradient, row) + start;
      const int64_t target = problem.target(row);
      if (problem.ignored(row)) {
        std::memset(out, 0, size * sizeof(T));
        continue;
      }
      const T* const x = row_start<const T>(logits, row) + start;
      const RowGradient row_gradient = {
          grad_logprobs != nullptr ? grad_logprobs[row] / problem.temperature : 0.0f,
          with_entropy ? grad_entropy[row] / problem.temperature : 0.0f,
          with_entropy ? entropy[row] : 0.0f,
          row_stats[row],
          row_stats[logits.rows + row],
      };
      const bool has_target = start <= target && target < start + size;
      const float x_target = has_target ? to_float(x[target - start]) : 0.0f;
      kernel(x, out, size, problem, row_gradient);
      if (has_target) {
        const float dz = row_gradient_target(logprobs[row], row_gradient.entropy, row_gradient.grad_logprob,
                                             row_gradient.grad_entropy, with_entropy);
        const float dz_dx = scaled_logit_derivative(x_target, problem.softcap, 1.0f, problem.softcap > 0);
        out[target - start] = from_float<T>(dz * dz_dx);
      }
    }
  });
}

}  // namespace rlk
