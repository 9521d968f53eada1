#pragma once

// A vector of floats as wide as the instruction set this file is compiled for, with the functions that the formulas in
// include/rlkernels need. Written once with GCC/Clang vector extensions; intrinsics only where the compilers have no
// expression for the instruction.

#include <array>
#include <bit>
#include <cstdint>
#include <cstring>
#include <limits>
#include <utility>

#include "rlkernels/math.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace rlk {

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

// Everything below is compiled once per instruction set: without internal linkage the linker would keep one copy of
// each function for all of them, and a machine without AVX-512 might meet that one.
namespace {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
// The masked forms of intrinsics, with every lane on: GCC 12 warns about the undefined operand inside the others.
constexpr __mmask16 kAllLanes = 0xffff;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

#if defined(__FMA__) || defined(__ARM_FEATURE_FMA)
constexpr bool kFusedMultiplyAdd = true;
#else
constexpr bool kFusedMultiplyAdd = false;
#endif

using Floats = float __attribute__((vector_size(4 * kLanes)));
using Ints = int32_t __attribute__((vector_size(4 * kLanes)));
using Halves = uint16_t __attribute__((vector_size(2 * kLanes)));

struct Mask {
  Ints bits;  // per lane all ones or zero

  friend Mask operator&(Mask a, Mask b) { return {a.bits & b.bits}; }
  friend Mask operator|(Mask a, Mask b) { return {a.bits | b.bits}; }
  friend Mask operator!(Mask a) { return {~a.bits}; }
};

struct Vec {
  Floats lanes;

  Vec() = default;
  Vec(Floats lanes) : lanes(lanes) {}
  Vec(float value) : lanes(value - Floats{}) {}

  friend Vec operator+(Vec a, Vec b) { return a.lanes + b.lanes; }
  friend Vec operator-(Vec a, Vec b) { return a.lanes - b.lanes; }
  friend Vec operator*(Vec a, Vec b) { return a.lanes * b.lanes; }
  friend Vec operator/(Vec a, Vec b) { return a.lanes / b.lanes; }
  friend Vec& operator+=(Vec& a, Vec b) { return a = a + b; }
  friend Vec operator-(Vec a) { return -a.lanes; }
  friend Mask operator<(Vec a, Vec b) { return {a.lanes < b.lanes}; }
  friend Mask operator>(Vec a, Vec b) { return {a.lanes > b.lanes}; }
  friend Mask operator<=(Vec a, Vec b) { return {a.lanes <= b.lanes}; }
  friend Mask operator>=(Vec a, Vec b) { return {a.lanes >= b.lanes}; }
  friend Mask operator==(Vec a, Vec b) { return {a.lanes == b.lanes}; }
  friend Mask operator!=(Vec a, Vec b) { return {a.lanes != b.lanes}; }
};

inline Vec select(Mask mask, Vec a, Vec b) { return mask.bits ? a.lanes : b.lanes; }
// Where one is NaN these give the second. GCC 12 makes a comparison and a blend of the expression, twice the work.
#if defined(__AVX512F__)
inline Vec max(Vec a, Vec b) { return _mm512_maskz_max_ps(kAllLanes, a.lanes, b.lanes); }
inline Vec min(Vec a, Vec b) { return _mm512_maskz_min_ps(kAllLanes, a.lanes, b.lanes); }
#elif defined(__AVX2__)
inline Vec max(Vec a, Vec b) { return _mm256_max_ps(a.lanes, b.lanes); }
inline Vec min(Vec a, Vec b) { return _mm256_min_ps(a.lanes, b.lanes); }
#elif defined(__x86_64__)
inline Vec max(Vec a, Vec b) { return _mm_max_ps(a.lanes, b.lanes); }
inline Vec min(Vec a, Vec b) { return _mm_min_ps(a.lanes, b.lanes); }
#else
inline Vec max(Vec a, Vec b) { return select(a > b, a, b); }
inline Vec min(Vec a, Vec b) { return select(a < b, a, b); }
#endif
inline Vec from_bits(Ints bits) { return std::bit_cast<Floats>(bits); }
inline Ints to_bits(Vec x) { return std::bit_cast<Ints>(x.lanes); }
inline Vec abs(Vec x) { return from_bits(to_bits(x) & 0x7fffffff); }
inline Vec product(Vec a, Vec b) {
  Floats value = a.lanes * b.lanes;
  RLK_ROUNDED(value);
  return value;
}

// Sums of many floats, kept in double: of the lower lanes and of the upper, each in a vector that fits a register.
class Sum {
 public:
  using Doubles = double __attribute__((vector_size(4 * kLanes)));

  // Adds function(x) of each lane.
  template <typename Function>
  void add(Vec x, Function function) {
    const auto wide = __builtin_convertvector(x.lanes, double __attribute__((vector_size(8 * kLanes))));
    Doubles halves[2];
    std::memcpy(halves, &wide, sizeof wide);
    lower_ += function(halves[0]);
    upper_ += function(halves[1]);
  }
  void add_square(Vec x) {
    add(x, [](Doubles wide) { return wide * wide; });
  }
  void operator+=(Vec x) {
    add(x, [](Doubles wide) { return wide; });
  }
  void operator+=(Sum other) {
    lower_ += other.lower_;
    upper_ += other.upper_;
  }
  double total() const {
    double sum = 0.0;
    for (int i = 0; i < kLanes / 2; ++i) sum += lower_[i];
    for (int i = 0; i < kLanes / 2; ++i) sum += upper_[i];
    return sum;
  }

 private:
  Doubles lower_ = {}, upper_ = {};
};

inline float horizontal_sum(Vec x) {
  float sum[kLanes];
  std::memcpy(sum, &x, sizeof x);
  for (int width = kLanes / 2; width > 0; width /= 2)
    for (int i = 0; i < width; ++i) sum[i] += sum[i + width];
  return sum[0];
}

inline float horizontal_max(Vec x) {
  float largest[kLanes];
  std::memcpy(largest, &x, sizeof x);
  for (int i = 1; i < kLanes; ++i) largest[0] = largest[0] > largest[i] ? largest[0] : largest[i];
  return largest[0];
}

// Lane i becomes lane i + kCount of the lanes of x followed by those of `behind`.
template <int kCount>
Vec shift_down(Vec x, Vec behind) {
#if defined(__clang__)
  return [&]<int... kLane>(std::integer_sequence<int, kLane...>) -> Vec {
    return __builtin_shufflevector(x.lanes, behind.lanes, (kLane + kCount)...);
  }(std::make_integer_sequence<int, kLanes>());
#else
  Ints from;
  for (int i = 0; i < kLanes; ++i) from[i] = i + kCount;
  return __builtin_shuffle(x.lanes, behind.lanes, from);
#endif
}

inline float first(Vec x) { return x.lanes[0]; }
inline Vec broadcast_first(Vec x) { return first(x); }

// 16-bit integers as 32-bit ones, the upper halves 0.
template <typename T>
Ints widen(const T* p) {
#if defined(__AVX512F__)
  const __m256i halves = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return std::bit_cast<Ints>(_mm512_maskz_cvtepu16_epi32(kAllLanes, halves));
#else
  Halves halves;
  std::memcpy(&halves, p, sizeof halves);
  return __builtin_convertvector(halves, Ints);
#endif
}

// Loads and stores convert; conversions round to nearest even.
inline Vec load(const float* p) {
  Vec x;
  std::memcpy(&x, p, sizeof x);
  return x;
}

inline void store(float* p, Vec x) { std::memcpy(p, &x, sizeof x); }

inline Vec load(const BFloat16* p) { return from_bits(widen(p) << 16); }

inline void store(BFloat16* p, Vec x) {
  const Ints bits = to_bits(x);
  // Rounding up could carry a NaN into the sign. (Results of arithmetic are quiet NaNs, which truncation leaves NaN.)
  const Ints rounded = (x == x).bits ? bits + 0x7fff + ((bits >> 16) & 1) : bits;
#if defined(__AVX512F__)
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                      _mm512_maskz_cvtepi32_epi16(kAllLanes, std::bit_cast<__m512i>(rounded >> 16)));
#else
  const Halves halves = __builtin_convertvector(rounded >> 16, Halves);
  std::memcpy(p, &halves, sizeof halves);
#endif
}

#if defined(__AVX512F__)
inline Vec load(const Float16* p) {
  return _mm512_maskz_cvtph_ps(kAllLanes, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
inline void store(Float16* p, Vec x) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                      _mm512_maskz_cvtps_ph(kAllLanes, x.lanes, _MM_FROUND_TO_NEAREST_INT));
}
#elif defined(__F16C__)
inline Vec load(const Float16* p) { return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))); }
inline void store(Float16* p, Vec x) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(x.lanes, _MM_FROUND_TO_NEAREST_INT));
}
#else
// float16 has 5 bits of exponent and 10 of mantissa, float32 8 and 23. Multiplying by a power of two rebiases the
// exponent and lets the hardware normalise or round; it is done at magnitudes where no float32 is denormal, since those
// may be flushed to zero.
inline Vec load(const Float16* p) {
  const Ints bits = widen(p);
  const Ints magnitude = (bits & 0x7fff) << 13;
  const Ints denormal = magnitude < (1 << 23);
  const Ints special = magnitude >= (31 << 23);
  const Ints bias = (denormal ? Ints{} + (113 << 23) : Ints{} + (112 << 23)) + (special & (112 << 23));
  const Vec value = from_bits(magnitude + bias);
  const Vec unbiased = select({denormal}, value - Vec(0x1p-14f), value);
  return from_bits(to_bits(unbiased) | ((bits & 0x8000) << 16));
}

inline void store(Float16* p, Vec x) {
  const Ints sign = (to_bits(x) >> 16) & 0x8000;
  const Vec magnitude = abs(x);
  const Ints bits = to_bits(magnitude);
  const Ints normal = (bits - (112 << 23) + 0xfff + ((bits >> 13) & 1)) >> 13;
  // Adding 0.5 puts the last bit of a float16 denormal, 2^-24, at the last bit of the mantissa.
  const Ints denormal = to_bits(magnitude + Vec(0.5f)) - to_bits(Vec(0.5f));
  Ints halves = (magnitude < Vec(0x1p-14f)).bits ? denormal : normal;
  halves = (magnitude >= Vec(65520.0f)).bits ? Ints{} + 0x7c00 : halves;
  halves = (x == x).bits ? halves : Ints{} + 0x7e00;
  const Halves packed = __builtin_convertvector(halves | sign, Halves);
  std::memcpy(p, &packed, sizeof packed);
}
#endif

// The first `count` <= kLanes elements at p, 0 in the other lanes.
template <typename T>
Vec load(const T* p, int64_t count) {
  if (count == kLanes) return load(p);
  T padded[kLanes] = {};
  std::memcpy(padded, p, count * sizeof(T));
  return load(padded);
}

template <typename T>
void store(T* p, Vec x, int64_t count) {
  if (count == kLanes) return store(p, x);
  T padded[kLanes];
  store(padded, x);
  std::memcpy(p, padded, count * sizeof(T));
}

// Asks for the cache line at p + distance, which may lie past the end, in the given level of cache: where loops read
// far more than the caches hold, the hardware's own prefetching leaves a third of the memory's bandwidth unused.
template <int kLevel, typename T>
void prefetch(const T* p, int64_t distance) {
  __builtin_prefetch(p + distance, 0, 4 - kLevel);
}

// Calls function(i, count) for the elements i .. i + count of every vector that covers [begin, end).
template <typename Function>
void for_each_vector(int64_t begin, int64_t end, Function function) {
  int64_t i = begin;
  for (; i + kLanes <= end; i += kLanes) function(i, kLanes);
  if (i < end) function(i, end - i);
}

// The first `count` <= kLanes elements at p as a mask.
inline Mask load_mask(const bool* p, int64_t count) {
  uint8_t bytes[16] = {};
  if (count == kLanes)
    std::memcpy(bytes, p, kLanes);
  else
    std::memcpy(bytes, p, count);
#if defined(__AVX512F__)
  const __m128i vector = _mm_loadu_si128(reinterpret_cast<const __m128i*>(bytes));
  return {std::bit_cast<Ints>(_mm512_maskz_cvtepu8_epi32(kAllLanes, vector)) != 0};
#elif defined(__AVX2__)
  return {std::bit_cast<Ints>(_mm256_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(bytes)))) != 0};
#else
  uint8_t vector __attribute__((vector_size(kLanes)));
  std::memcpy(&vector, bytes, sizeof vector);
  return {__builtin_convertvector(vector, Ints) != 0};
#endif
}

// Whether all, or none, of the kLanes elements at p are true.
inline bool all_set(const bool* p) {
  static constexpr auto kTrue = [] {
    std::array<bool, kLanes> all;
    all.fill(true);
    return all;
  }();
  return std::memcmp(p, kTrue.data(), kLanes) == 0;
}

inline bool none_set(const bool* p) {
  static constexpr std::array<bool, kLanes> kFalse = {};
  return std::memcmp(p, kFalse.data(), kLanes) == 0;
}

inline Mask first_lanes(int64_t count) {
  Ints lane;
  for (int i = 0; i < kLanes; ++i) lane[i] = i;
  return {lane < static_cast<int32_t>(count)};
}

// exp(x) = 2^n exp(r), n the nearest integer to x / ln 2 and |r| <= ln(2) / 2. Adding 1.5 * 2^23 rounds to an integer
// and leaves it in the low bits of the sum.
constexpr float kRound = 0x1.8p23f;

struct Reduced {
  Vec n, r;
  Ints n_bits;  // of n + kRound: n in the low bits, which a shift to the exponent's place alone keeps
};

inline Reduced reduce(Vec x) {
  const Vec shifted = x * Vec(1.44269504f) + Vec(kRound);
  const Vec n = shifted - Vec(kRound);
  // ln 2 in two parts where the product n * ln 2 would be rounded; the first has 15 bits, so that n times it is exact.
  const Vec r = kFusedMultiplyAdd ? x - n * Vec(0x1.62e43p-1f) : (x - n * Vec(0.693359375f)) + n * Vec(2.12194440e-4f);
  return {n, r, to_bits(shifted)};
}

// q in exp(r) = 1 + r + r^2 q(r): the minimax polynomial on |r| <= ln(2) / 2, to 0.3 * 2^-24 of exp(r) - 1.
inline Vec series(Vec r) {
  Vec q = Vec(0x1.6bebfep-10f);
  q = q * r + Vec(0x1.1227b0p-7f);
  q = q * r + Vec(0x1.555674p-5f);
  q = q * r + Vec(0x1.5554b0p-3f);
  return q * r + Vec(0x1.fffffep-2f);
}

inline Vec exp_reduced(Vec r) { return (series(r) * r + Vec(1.0f)) * r + Vec(1.0f); }

inline Ints to_int(Vec n) { return to_bits(n + Vec(kRound)) - to_bits(Vec(kRound)); }
inline Vec power_of_two(Ints n) { return from_bits((n + 127) << 23); }

// x * 2^n
inline Vec scale(Vec x, Vec n) {
#if defined(__AVX512F__)
  return _mm512_maskz_scalef_ps(kAllLanes, x.lanes, n.lanes);
#else
  // In two factors, since at both ends of the range 2^n alone is not a normal number.
  const Ints whole = to_int(n), half = whole >> 1;
  return x * power_of_two(half) * power_of_two(whole - half);
#endif
}

inline Vec exp(Vec x) {
  const Reduced x_parts = reduce(min(Vec(89.0f), max(Vec(-104.0f), x)));
  return scale(exp_reduced(x_parts.r), x_parts.n);
}

// 2^n (exp(r) - 1) + (2^n - 1), from half of 2^n, which exists up to the largest n, 128.
inline Vec expm1(Vec x) {
  const auto [n, r, n_bits] = reduce(min(Vec(89.0f), max(Vec(-20.0f), x)));
  const Vec half = from_bits((n_bits << 23) + (126 << 23));
  const Vec value = half * (series(r) * (r * r) + r) + (half - Vec(0.5f));
  return value + value;
}

inline Exponentials<Vec> exponentials(Vec x) {
  const auto [n, r, n_bits] = reduce(min(Vec(89.0f), max(Vec(-104.0f), x)));
  const Vec q = series(r), exp = scale((q * r + Vec(1.0f)) * r + Vec(1.0f), n);
  // Where 2^n is not a normal number, exp(x) - 1 is -1 or exp(x).
  const Vec power = from_bits((n_bits << 23) + (127 << 23));
  const Vec expm1 = power * (q * (r * r) + r) + (power - Vec(1.0f));
  return {exp, select(abs(x) < Vec(20.0f), expm1, exp - Vec(1.0f))};
}

// log(x) = n ln 2 + log(1 + f), x = 2^n (1 + f) and sqrt(1/2) <= 1 + f < sqrt(2), for normal x.
inline Vec log(Vec x) {
  const Ints root = to_bits(Vec(0x1.6a09e6p-1f)), bits = to_bits(x) - root;
  const Vec n = __builtin_convertvector(bits >> 23, Floats);
  const Vec f = from_bits((bits & 0x7fffff) + root) - Vec(1.0f);
  // (log(1 + f) - f + f^2 / 2) / f^3, minimax to 0.1 * 2^-24 of log(1 + f).
  Vec q = Vec(-0x1.38b580p-4f);
  q = q * f + Vec(0x1.055b6ap-3f);
  q = q * f + Vec(-0x1.0d8542p-3f);
  q = q * f + Vec(0x1.22da1cp-3f);
  q = q * f + Vec(-0x1.547244p-3f);
  q = q * f + Vec(0x1.99a008p-3f);
  q = q * f + Vec(-0x1.000226p-2f);
  q = q * f + Vec(0x1.555554p-2f);
  const Vec square = f * f;
  // ln 2 in two parts, the first with 15 bits.
  const Vec small = n * Vec(-2.12194440e-4f) + (q * (square * f) - Vec(0.5f) * square);
  const Vec value = n * Vec(0.693359375f) + (f + small);
  return select(x > Vec(0.0f), select(x < Vec(std::numeric_limits<float>::infinity()), value, x),
                select(x == Vec(0.0f), Vec(-std::numeric_limits<float>::infinity()), x - x / Vec(0.0f)));
}

inline Vec tanh(Vec x) {
  const Vec magnitude = abs(x), square = x * x;
  const Vec large = Vec(1.0f) - Vec(2.0f) / (exp(magnitude + magnitude) + Vec(1.0f));
  // Below 1 that would lose digits. Minimax polynomial for (tanh(x) - x) / x^3.
  Vec q = Vec(-0x1.7807f8p-12f);
  q = q * square + Vec(0x1.2db7f2p-9f);
  q = q * square + Vec(-0x1.046760p-7f);
  q = q * square + Vec(0x1.600bd8p-6f);
  q = q * square + Vec(-0x1.b96288p-5f);
  q = q * square + Vec(0x1.110be6p-3f);
  q = q * square + Vec(-0x1.55553cp-2f);
  const Vec small = q * (square * magnitude) + magnitude;
  const Vec value = select(magnitude < Vec(1.0f), small, large);
  return from_bits(to_bits(value) | (to_bits(x) & std::numeric_limits<int32_t>::min()));
}

// Flushes denormal results to zero while it lives: probabilities below 2^-126 are many in a large vocabulary, count for
// nothing, and cost a hundred cycles each.
class FlushDenormals {
 public:
#if defined(__x86_64__)
  FlushDenormals() : saved_(_mm_getcsr()) { _mm_setcsr(saved_ | _MM_FLUSH_ZERO_ON | 0x0040 /* denormal inputs */); }
  ~FlushDenormals() { _mm_setcsr(saved_); }

 private:
  unsigned saved_;
#elif defined(__aarch64__)
  FlushDenormals() {
    asm volatile("mrs %0, fpcr" : "=r"(saved_));
    asm volatile("msr fpcr, %0" : : "r"(saved_ | (1 << 24)));
  }
  ~FlushDenormals() { asm volatile("msr fpcr, %0" : : "r"(saved_)); }

 private:
  uint64_t saved_;
#endif
};

}  // namespace
}  // namespace rlk
