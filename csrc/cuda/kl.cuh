// kl_penalty: elementwise, 16 bytes at a time.
#pragma once

#include "block.cuh"
#include "rlkernels/kl.h"

namespace rlk {

struct KlOptions {
  int estimator;
  bool straight_through;
  float log_ratio_clamp, value_clamp;
};

// `count` elements, of which the first 4 * vectors are read and written as vectors: all but the last few, or none where
// an address is not aligned.
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

}  // namespace rlk
