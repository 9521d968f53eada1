// What the kernels share: reductions over a block, and floats from and to 16 bits.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <cstring>

#include "rlkernels/math.h"

namespace rlk {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kNan = std::numeric_limits<float>::quiet_NaN();

constexpr unsigned kWarp = 32;
constexpr unsigned kMaxWarps = 32;

// `shuffle` takes one word of this lane and returns that of another.
template <typename T, typename Shuffle>
__device__ T shuffle_words(T value, Shuffle shuffle) {
  static_assert(sizeof(T) % 4 == 0);
  unsigned words[sizeof(T) / 4];
  memcpy(words, &value, sizeof value);
#pragma unroll
  for (unsigned& word : words) word = shuffle(word);
  memcpy(&value, words, sizeof value);
  return value;
}

template <typename T>
__device__ T shuffle_xor(T value, int lanes) {
  return shuffle_words(value, [lanes](unsigned word) { return __shfl_xor_sync(0xffffffffu, word, lanes); });
}

template <typename T>
__device__ T shuffle_down(T value, int lanes) {
  return shuffle_words(value, [lanes](unsigned word) { return __shfl_down_sync(0xffffffffu, word, lanes); });
}

// Combines the values of all threads of the block, whole warps of them, into one that every thread gets. The order is
// fixed by the block's size alone.
template <typename T, typename Combine>
__device__ T block_reduce(T value, Combine combine) {
  __shared__ T warp_values[kMaxWarps];
#pragma unroll
  for (int lanes = kWarp / 2; lanes > 0; lanes /= 2) value = combine(value, shuffle_xor(value, lanes));
  if (threadIdx.x % kWarp == 0) warp_values[threadIdx.x / kWarp] = value;
  __syncthreads();
  value = warp_values[0];
  for (unsigned warp = 1; warp < blockDim.x / kWarp; ++warp) value = combine(value, warp_values[warp]);
  // The next reduction writes where slower warps still read.
  __syncthreads();
  return value;
}

__device__ inline float to_float(float x) { return x; }
__device__ inline float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ inline float to_float(__half x) { return __half2float(x); }

template <typename T>
__device__ T from_float(float x);
template <>
__device__ inline float from_float(float x) {
  return x;
}
template <>
__device__ inline __nv_bfloat16 from_float(float x) {
  return __float2bfloat16_rn(x);
}
template <>
__device__ inline __half from_float(float x) {
  return __float2half_rn(x);
}

}  // namespace rlk
