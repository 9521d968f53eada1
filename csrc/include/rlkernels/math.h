// The few functions that the formulas are written in, so that one text serves a float on a GPU, a float on a CPU, and
// the SIMD vectors of csrc/cpu/simd.h, which overload them.
#pragma once

#include <cmath>
#include <limits>

#if defined(__CUDACC__)
#define RLK_HD __host__ __device__ __forceinline__
#else
#define RLK_HD inline __attribute__((always_inline))
#endif

namespace rlk {

RLK_HD float select(bool condition, float yes, float no) { return condition ? yes : no; }
RLK_HD double select(bool condition, double yes, double no) { return condition ? yes : no; }
RLK_HD float exp(float x) { return ::expf(x); }
RLK_HD float expm1(float x) { return ::expm1f(x); }
RLK_HD float log(float x) { return ::logf(x); }
RLK_HD float log1p(float x) { return ::log1pf(x); }
RLK_HD float sqrt(float x) { return ::sqrtf(x); }
RLK_HD double sqrt(double x) { return ::sqrt(x); }
RLK_HD float tanh(float x) { return ::tanhf(x); }
RLK_HD float abs(float x) { return ::fabsf(x); }

// Keeps a CPU's compiler from making one half of a fused multiply-add of `x`.
#if defined(__x86_64__)
#define RLK_ROUNDED(x) asm("" : "+v"(x))
#elif defined(__aarch64__)
#define RLK_ROUNDED(x) asm("" : "+w"(x))
#else
#define RLK_ROUNDED(x) asm("" : "+m"(x))
#endif

// a * b, rounded, whatever it is added to: where a product is compared with itself, computed elsewhere, as in x - max
// x, a difference of 0 would else be what one of the two has lost in rounding.
RLK_HD float product(float a, float b) {
#if defined(__CUDA_ARCH__)
  return __fmul_rn(a, b);
#else
  float value = a * b;
  RLK_ROUNDED(value);
  return value;
#endif
}

// exp(x) and expm1(x), each as accurate as by itself. On a CPU they share most of the work.
template <class F>
struct Exponentials {
  F exp, expm1;
};
RLK_HD Exponentials<float> exponentials(float x) { return {::expf(x), ::expm1f(x)}; }

// A NaN in x stays a NaN, as in PyTorch's clamp.
template <class F>
RLK_HD F clamp(F x, F low, F high) {
  return select(x < low, low, select(x > high, high, x));
}

// What numbers with this standard deviation are multiplied by before they are whitened: near float's largest numbers
// their differences would overflow, and 1 / std would have lost digits. It is a power of two: nothing is rounded.
RLK_HD double whitening_unit(double std) { return std > 0x1p64 ? 0x1p-64 : 1.0; }

}  // namespace rlk
