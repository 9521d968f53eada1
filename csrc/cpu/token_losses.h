#pragma once

// What the CPU kernels of the losses over tokens share. Included after simd.h, and compiled like it.

#include <algorithm>

#include "rlkernels/sequences.h"
#include "simd.h"

namespace rlk {
namespace {

// Which of the tokens [i, i + count) are scored. Without a mask all are.
inline Mask scored_tokens(const bool* mask, int64_t i, int64_t count) {
  return mask != nullptr ? load_mask(mask + i, count) : first_lanes(count);
}

inline int64_t count_scored(const bool* mask, int64_t begin, int64_t end) {
  if (mask == nullptr) return end - begin;
  constexpr int64_t kExact = int64_t{kLanes} << 30;  // what the lanes of Ints can count
  int64_t total = 0;
  for (; begin < end; begin += kExact) {
    Ints counts = {};
    for_each_vector(begin, std::min(end, begin + kExact),
                    [&](int64_t i, int64_t count) { counts -= load_mask(mask + i, count).bits; });
    for (int lane = 0; lane < kLanes; ++lane) total += counts[lane];
  }
  return total;
}

// Calls function(begin, end, s) for each part of the tokens [begin, end) that lies in one sequence s, in pieces of at
// most kPiece tokens: few enough for float sums over them to keep their digits.
template <typename Function>
void for_each_piece(const Sequences& sequences, int64_t begin, int64_t end, Function function) {
  constexpr int64_t kPiece = 16 * kLanes;
  for (int64_t s = sequences.of(begin); begin < end; ++s) {
    const int64_t run_end = std::min(end, sequences.start(s + 1));
    for (; begin < run_end; begin = std::min(run_end, begin + kPiece))
      function(begin, std::min(run_end, begin + kPiece), s);
  }
}

}  // namespace
}  // namespace rlk
