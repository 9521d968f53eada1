// Reads inputs in the dtypes that the caller gave. `kPlain` says that numbers are float and masks bytes: then nothing
// is asked for at run time. Launchers choose it.
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

}  // namespace rlk
