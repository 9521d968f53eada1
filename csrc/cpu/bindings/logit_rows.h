// Rows of logits of any element type, as the CPU kernels take them.
#pragma once

#include "bindings.h"
#include "cpu/logprobs.h"

namespace rlk {

inline DType dtype_of(const Tensor& logits) {
  if (logits.scalar_type() == ScalarType::BFloat16) return DType::kBFloat16;
  if (logits.scalar_type() == ScalarType::Half) return DType::kFloat16;
  return DType::kFloat32;
}

// The rows of a tile [R, v], which are dense.
inline LogitRows tile_rows(const Tensor& tile) {
  return {tile.data_ptr(), dtype_of(tile), tile.size(0), tile.size(0), tile.size(1), 0, tile.stride(0)};
}

}  // namespace rlk
