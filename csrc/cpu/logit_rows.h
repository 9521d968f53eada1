// Rows of logits of any element type, for the kernels that read them.
#pragma once

#include "cpu/logprobs.h"
#include "simd.h"

namespace rlk {
namespace {

// Calls function(element) with an element of the type.
template <typename Function>
void with_element_type(DType dtype, Function function) {
  switch (dtype) {
    case DType::kFloat32:
      return function(float{});
    case DType::kBFloat16:
      return function(BFloat16{});
    case DType::kFloat16:
      return function(Float16{});
  }
}

template <typename T>
T* row_start(const LogitRows& logits, int64_t row) {
  return static_cast<T*>(logits.data) + row / logits.inner * logits.outer_stride +
         row % logits.inner * logits.inner_stride;
}

}  // namespace
}  // namespace rlk
