// What the registrations of the CPU kernels share: the choice of an instruction set, threads, and access to tensors.
// Shapes, dtypes and devices were checked in rlkernels/ops; the values of ids and cu_seqlens are checked here.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "cpu/kernels.h"
#include "rlkernels/sequences.h"

namespace rlk {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// The best the processor has, or the one named by RLKERNELS_CPU_ISA.
Isa instruction_set();

// Calls function(Kernels<isa>{}), such as `with_kernels<KlKernels>(...)`.
template <template <Isa> class Kernels, typename Function>
void with_kernels(Function function) {
  switch (instruction_set()) {
#if defined(__x86_64__)
    case Isa::kAvx512:
      return function(Kernels<Isa::kAvx512>{});
    case Isa::kAvx2:
      return function(Kernels<Isa::kAvx2>{});
#endif
    default:
      return function(Kernels<Isa::kBaseline>{});
  }
}

// With fewer elements than this per thread, waking a thread costs more than it saves.
constexpr int64_t kGrain = 16384;

// Calls function(begin, end) on several threads for parts of `count` items of about `item_size` elements each.
template <typename Function>
void parallel(int64_t count, int64_t item_size, Function function) {
  const int64_t grain = std::max<int64_t>(1, kGrain / std::max<int64_t>(1, item_size));
  torch::stable::parallel_for(0, count, grain, function);
}

inline const float* floats(const Tensor& tensor) { return tensor.const_data_ptr<float>(); }

template <typename T>
const T* data_or_null(const std::optional<Tensor>& tensor) {
  return tensor ? tensor->const_data_ptr<T>() : nullptr;
}

inline Tensor empty_floats(torch::headeronly::IntHeaderOnlyArrayRef sizes) {
  return torch::stable::empty(sizes, ScalarType::Float);
}

// Where the sequences of a padded [count, length] or packed [tokens] tensor lie. Throws unless cu_seqlens run from 0
// to the number of tokens without decreasing.
inline Sequences sequences_of(const Tensor& tensor, const std::optional<Tensor>& cu_seqlens) {
  const int64_t tokens = tensor.numel();
  if (!cu_seqlens) return {nullptr, tokens, tensor.size(0), tensor.size(1)};
  const int32_t* const starts = cu_seqlens->const_data_ptr<int32_t>();
  const int64_t count = cu_seqlens->numel() - 1;
  const auto refuse = [](const std::string& wanted, int64_t got, int64_t position) {
    throw std::invalid_argument("cu_seqlens must " + wanted + "; got " + std::to_string(got) + " at position " +
                                std::to_string(position));
  };
  if (starts[0] != 0) refuse("start with 0", starts[0], 0);
  for (int64_t s = 0; s < count; ++s)
    if (starts[s + 1] < starts[s]) refuse("not decrease", starts[s + 1], s + 1);
  if (starts[count] != tokens) refuse("end with the number of tokens, " + std::to_string(tokens), starts[count], count);
  return {starts, tokens, count, 0};
}

}  // namespace rlk
