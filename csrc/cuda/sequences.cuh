// Whether cu_seqlens are what they should be: on a GPU no host looks at their values.
#pragma once

#include "block.cuh"
#include "launch.h"
#include "rlkernels/sequences.h"

namespace rlk {

constexpr int kValidThreads = kWarp * kMaxWarps;

// One block. What results are multiplied by: 1, or NaN unless cu_seqlens run from 0 to the number of tokens without
// decreasing.
static __global__ void __launch_bounds__(kValidThreads) sequences_valid_kernel(Sequences sequences, float* valid) {
  const int32_t* cu_seqlens = sequences.cu_seqlens;
  int wrong = cu_seqlens[0] != 0 || cu_seqlens[sequences.count] != sequences.tokens;
  for (int64_t s = threadIdx.x; s < sequences.count; s += kValidThreads) wrong |= cu_seqlens[s] > cu_seqlens[s + 1];
  wrong = block_reduce(wrong, [](int a, int b) { return a | b; });
  if (threadIdx.x == 0) *valid = wrong ? kNan : 1.0f;
}

// Null without cu_seqlens.
inline const float* launch_valid(Launcher& launch, const Sequences& sequences) {
  if (sequences.cu_seqlens == nullptr) return nullptr;
  float* const valid = launch.room_for<float>(1);
  launch(sequences_valid_kernel, 1, kValidThreads, sequences, valid);
  return valid;
}

}  // namespace rlk
