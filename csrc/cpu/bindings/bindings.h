// What the registrations of the CPU kernels share: the choice of an instruction set, threads, and access to tensors.
// Shapes, dtypes and devices were checked in rlkernels/ops; the values of ids and cu_seqlens are checked here.
#pragma once

#include <algorithm>
#include <stdexcept>
#include <string>
#include <vector>

#include "cpu/kernels.h"
#include "rlkernels/aggregation.h"
#include "rlkernels/ops.h"
#include "rlkernels/sequences.h"

namespace rlk {

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

inline Tensor empty_floats(torch::headeronly::IntHeaderOnlyArrayRef sizes) {
  return torch::stable::empty(sizes, ScalarType::Float);
}

// What the ops of rlkernels/ops.h ask of a device, but for `run`.
struct Cpu {
  using Array = const float*;
  using FlagArray = const bool*;

  static const float* array(const std::optional<Tensor>& tensor) { return data_or_null<float>(tensor); }
  static const bool* flags(const std::optional<Tensor>& tensor) { return data_or_null<bool>(tensor); }

  // Where the sequences of a padded [count, length] or packed [tokens] tensor lie. Throws unless cu_seqlens run from 0
  // to the number of tokens without decreasing.
  static Sequences sequences(const Tensor& tensor, const std::optional<Tensor>& cu_seqlens) {
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
    if (starts[count] != tokens)
      refuse("end with the number of tokens, " + std::to_string(tokens), starts[count], count);
    return {starts, tokens, count, 0};
  }

  static Denominator denominator(const std::optional<Tensor>& normalizer, double normalizer_value,
                                 int64_t aggregation) {
    const float value = normalizer ? *floats(*normalizer) : static_cast<float>(normalizer_value);
    return {normalizer || value > 0.0f, value, static_cast<int>(aggregation)};
  }
};

}  // namespace rlk
