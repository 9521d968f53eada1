// token_logprobs: a block per row of logits.
#pragma once

#include "block.cuh"
#include "logprobs.h"
#include "rlkernels/logprobs.h"

namespace rlk {

constexpr int kRowThreads = 256;
// Logits that a thread holds at once: 64 or 32 bytes under way hide the latency of memory, more would cost occupancy.
constexpr int kStep = 16;
template <typename T>
constexpr int kStepVectors = kStep / kVector<T>;

// A division by 1 and a softcap that is not there cost nothing: each case is compiled on its own.
enum class Scaling { kNone, kTemperature, kSoftcap };

template <Scaling kScaling>
struct LogitScale {
  float softcap, temperature;

  __device__ float divisor() const { return kScaling == Scaling::kNone ? 1.0f : temperature; }
  __device__ float operator()(float x) const {
    return scaled_logit(x, softcap, divisor(), kScaling == Scaling::kSoftcap);
  }
  __device__ float derivative(float x) const {
    return scaled_logit_derivative(x, softcap, divisor(), kScaling == Scaling::kSoftcap);
  }
};

template <bool kEntropy, int kCount>
__device__ RowSums<float> row_sums(const float (&z)[kCount]) {
  RowSums<float> sums = {z[0], 0.0f, 0.0f};
#pragma unroll
  for (int i = 1; i < kCount; ++i) sums.m = fmaxf(sums.m, z[i]);
  const float origin = sums.m == -kInfinity ? 0.0f : sums.m;  // -inf - -inf would be NaN
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    const float d = z[i] - origin, e = exp(d);
    sums.s += e;
    if (kEntropy) sums.w += e == 0.0f ? 0.0f : e * d;
  }
  return sums;
}

template <typename T, Scaling kScaling, bool kEntropy>
__global__ void __launch_bounds__(kRowThreads)
    token_logprobs_forward_kernel(const T* logits, LogitRows rows, const int64_t* token_ids, LogitScale<kScaling> scale,
                                  int64_t ignore_index, float* logprobs, float* entropy, RowStats stats) {
  const int thread = threadIdx.x;
  const int64_t row = blockIdx.x, target = token_ids[row];
  const bool ignored = target == ignore_index;
  RowResult<float> result = {0.0f, 0.0f, 0.0f, 0.0f};
  if (!ignored && (target < 0 || target >= rows.vocab)) result = {kNan, kNan, kNan, kNan};
  if (!ignored && 0 <= target && target < rows.vocab) {
    const T* x = logits + rows.start(row);
    const bool aligned = elements_to_boundary(x) == 0;
    // Which logits a thread adds up depends on their place in the row alone, so that equal rows have equal sums
    // wherever they lie in memory.
    const int vectors = rows.vocab / kVector<T>;
    RowSums<float> others = {-kInfinity, 0.0f, 0.0f};
    for (int first = thread; first < vectors; first += kStepVectors<T> * kRowThreads) {
      uint4 raw[kStepVectors<T>];
#pragma unroll
      for (int u = 0; u < kStepVectors<T>; ++u) {
        const int vector = first + u * kRowThreads;
        if (vector < vectors) raw[u] = load_vector(x + vector * kVector<T>, aligned);
      }
      float z[kStep];
#pragma unroll
      for (int u = 0; u < kStepVectors<T>; ++u) {
        const int vector = first + u * kRowThreads, v = vector * kVector<T>;
        float* const part = z + u * kVector<T>;
        if (vector < vectors) unpack<T>(raw[u], part);
#pragma unroll
        for (int i = 0; i < kVector<T>; ++i) part[i] = vector < vectors ? scale(part[i]) : -kInfinity;
        if (v <= target && target < v + kVector<T>) {
#pragma unroll
          for (int i = 0; i < kVector<T>; ++i) part[i] = v + i == target ? -kInfinity : part[i];
        }
      }
      others = merge(others, row_sums<kEntropy>(z));
    }
    const int last = vectors * kVector<T> + thread;
    const float rest[1] = {last < rows.vocab && last != target ? scale(to_float(x[last])) : -kInfinity};
    others = merge(others, row_sums<kEntropy>(rest));
    others = block_reduce(others, [](RowSums<float> a, RowSums<float> b) { return merge(a, b); });
    if (thread == 0) result = finish_row(others, scale(to_float(x[target])));
  }
  if (thread != 0) return;
  logprobs[row] = result.logprob;
  if (kEntropy) entropy[row] = result.entropy;
  stats.max[row] = result.max;
  stats.log_sum[row] = result.log_sum;
}

// One read of the logits and one write of the gradient, which may be to the same place. entropy and either gradient may
// be null.
template <typename T, Scaling kScaling>
__global__ void __launch_bounds__(kRowThreads, 3)  // three blocks leave the registers that sm_100 would else spill
    token_logprobs_backward_kernel(const float* grad_logprobs, const float* grad_entropy, const T* logits,
                                   LogitRows rows, const int64_t* token_ids, const float* logprobs,
                                   const float* entropy, RowStats stats, LogitScale<kScaling> scale,
                                   int64_t ignore_index, T* gradient, LogitRows gradient_rows) {
  const int thread = threadIdx.x;
  const int64_t row = blockIdx.x, target = token_ids[row];
  const T* const x = logits + rows.start(row);
  T* const out = gradient + gradient_rows.start(row);
  // The gradient's row: elements up to the first multiple of 16 bytes, vectors, and the elements that are left.
  const int head = min(elements_to_boundary(out), rows.vocab), vectors = (rows.vocab - head) / kVector<T>;
  const int last = head + vectors * kVector<T> + thread;

  const bool ignored = target == ignore_index;
  if (ignored || target < 0 || target >= rows.vocab) {
    float values[kVector<T>];
    for (float& value : values) value = ignored ? 0.0f : kNan;
    if (thread < head) out[thread] = from_float<T>(values[0]);
    for (int vector = thread; vector < vectors; vector += kRowThreads)
      store_vector(out + head + vector * kVector<T>, values);
    if (last < rows.vocab) out[last] = from_float<T>(values[0]);
    return;
  }

  const bool has_entropy = grad_entropy != nullptr;
  const float g = grad_logprobs != nullptr ? grad_logprobs[row] : 0.0f, h = has_entropy ? grad_entropy[row] : 0.0f;
  const float row_entropy = has_entropy ? entropy[row] : 0.0f, max = stats.max[row], log_sum = stats.log_sum[row];
  const float target_dz = row_gradient_target(logprobs[row], row_entropy, g, h, has_entropy);
  const auto gradient_of = [&](float x_v, bool is_target) {
    const float dz = row_gradient(row_log_p(scale(x_v), max, log_sum), row_entropy, g, h, has_entropy);
    return (is_target ? target_dz : dz) * scale.derivative(x_v);
  };

  if (thread < head) out[thread] = from_float<T>(gradient_of(to_float(x[thread]), thread == target));
  // Rows of an odd length, strided differently from the gradient's, may be aligned differently.
  const bool aligned = elements_to_boundary(x + head) == 0;
  for (int first = thread; first < vectors; first += kStepVectors<T> * kRowThreads) {
    uint4 raw[kStepVectors<T>];
#pragma unroll
    for (int u = 0; u < kStepVectors<T>; ++u) {
      const int vector = first + u * kRowThreads;
      if (vector < vectors) raw[u] = load_vector(x + head + vector * kVector<T>, aligned);
    }
#pragma unroll
    for (int u = 0; u < kStepVectors<T>; ++u) {
      const int vector = first + u * kRowThreads, v = head + vector * kVector<T>;
      if (vector >= vectors) break;
      float part[kVector<T>];
      unpack<T>(raw[u], part);
#pragma unroll
      for (int i = 0; i < kVector<T>; ++i) part[i] = gradient_of(part[i], v + i == target);
      store_vector(out + v, part);
    }
  }
  if (last < rows.vocab) out[last] = from_float<T>(gradient_of(to_float(x[last]), last == target));
}

}  // namespace rlk
