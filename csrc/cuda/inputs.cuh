// Reads inputs in the dtypes that the caller gave. `kPlain` says that numbers are float and masks bytes: then nothing
// is asked for at run time, and arrays start at multiples of 16 bytes. Launchers choose it by all_plain.
#pragma once

#include "block.cuh"
#include "inputs.h"

namespace rlk {

template <bool kPlain>
__device__ float element(Floats array, int64_t i) {
  if (kPlain || array.dtype == Dtype::kFloat) return static_cast<const float*>(array.data)[i];
  if (array.dtype == Dtype::kBfloat16) return to_float(static_cast<const __nv_bfloat16*>(array.data)[i]);
  if (array.dtype == Dtype::kHalf) return to_float(static_cast<const __half*>(array.data)[i]);
  return static_cast<float>(static_cast<const double*>(array.data)[i]);
}

// The only element, which may also be an integer.
__device__ inline float number(Floats array) {
  switch (array.dtype) {
    case Dtype::kInt64:
      return static_cast<float>(*static_cast<const int64_t*>(array.data));
    case Dtype::kInt32:
      return static_cast<float>(*static_cast<const int32_t*>(array.data));
    case Dtype::kInt16:
      return static_cast<float>(*static_cast<const int16_t*>(array.data));
    case Dtype::kInt8:
      return static_cast<float>(*static_cast<const int8_t*>(array.data));
    case Dtype::kUint8:
      return static_cast<float>(*static_cast<const uint8_t*>(array.data));
    default:
      return element<false>(array, 0);
  }
}

template <bool kPlain>
__device__ bool element(Flags array, int64_t i) {
  if (kPlain || array.bytes == 1) return static_cast<const uint8_t*>(array.data)[i] != 0;
  const unsigned sign = array.floating;  // is shifted out
  if (array.bytes == 2) return static_cast<uint16_t>(static_cast<const uint16_t*>(array.data)[i] << sign) != 0;
  if (array.bytes == 4) return static_cast<const uint32_t*>(array.data)[i] << sign != 0;
  return static_cast<const uint64_t*>(array.data)[i] << sign != 0;
}

template <bool kPlain>
__device__ void store(FloatsOut array, int64_t i, float value) {
  if (kPlain || array.dtype == Dtype::kFloat)
    static_cast<float*>(array.data)[i] = value;
  else if (array.dtype == Dtype::kBfloat16)
    static_cast<__nv_bfloat16*>(array.data)[i] = from_float<__nv_bfloat16>(value);
  else if (array.dtype == Dtype::kHalf)
    static_cast<__half*>(array.data)[i] = from_float<__half>(value);
  else
    static_cast<double*>(array.data)[i] = value;
}

// ---- runs of four from `first`: those of [begin, end), and 0 for the others. Where inputs are plain, `begin` is 0,
// `end` is a multiple of 4 as `first` is, and a run is read and written at once. Indices are from `start`.

constexpr int kRun = 4;

struct Range {
  int64_t start;
  int begin, end;

  template <bool kPlain>
  __device__ bool has(int i) const {
    return i < end && (kPlain || i >= begin);
  }
};

template <bool kPlain>
__device__ void load_run(Floats array, const Range& range, int first, float (&values)[kRun]) {
  if constexpr (kPlain) {
    float4 four = {};
    if (first < range.end)
      four = *reinterpret_cast<const float4*>(static_cast<const float*>(array.data) + range.start + first);
    values[0] = four.x, values[1] = four.y, values[2] = four.z, values[3] = four.w;
  } else {
#pragma unroll
    for (int i = 0; i < kRun; ++i)
      values[i] = range.has<kPlain>(first + i) ? element<kPlain>(array, range.start + first + i) : 0.0f;
  }
}

// A byte for each, which is not 0 where it is set.
struct FlagRun {
  uint32_t bytes;

  __device__ bool operator[](int i) const { return (bytes >> 8 * i & 0xff) != 0; }
};

// Without an array they are all set.
template <bool kPlain>
__device__ FlagRun load_run(Flags array, const Range& range, int first) {
  FlagRun run = {};
  if constexpr (kPlain) {
    if (first < range.end)
      run.bytes =
          array.data == nullptr
              ? ~0u
              : *reinterpret_cast<const uint32_t*>(static_cast<const uint8_t*>(array.data) + range.start + first);
  } else {
#pragma unroll
    for (int i = 0; i < kRun; ++i)
      if (range.has<kPlain>(first + i) && (array.data == nullptr || element<kPlain>(array, range.start + first + i)))
        run.bytes |= 1u << 8 * i;
  }
  return run;
}

template <bool kPlain>
__device__ void store_run(FloatsOut array, const Range& range, int first, const float (&values)[kRun]) {
  if constexpr (kPlain) {
    // nvcc would turn an assignment into four stores for sm_80 and sm_90.
    if (first < range.end)
      __stcg(reinterpret_cast<float4*>(static_cast<float*>(array.data) + range.start + first),
             make_float4(values[0], values[1], values[2], values[3]));
  } else {
#pragma unroll
    for (int i = 0; i < kRun; ++i)
      if (range.has<kPlain>(first + i)) store<kPlain>(array, range.start + first + i, values[i]);
  }
}

template <bool kPlain>
__device__ void store_run(float* array, const Range& range, int first, const float (&values)[kRun]) {
  store_run<kPlain>(FloatsOut{array, Dtype::kFloat}, range, first, values);
}

}  // namespace rlk
