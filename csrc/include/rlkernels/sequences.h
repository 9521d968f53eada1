// Where the sequences of a batch begin and end: padded [count, length], or packed one after the other.
#pragma once

#include <cstdint>

#include "rlkernels/math.h"

namespace rlk {

struct Sequences {
  const int32_t* cu_seqlens;  // [count + 1], or null: sequences of `length` tokens
  int64_t tokens, count, length;

  // Within [0, tokens] whatever cu_seqlens holds: on a GPU nobody has looked at its values.
  RLK_HD int64_t start(int64_t s) const {
    if (cu_seqlens == nullptr) return s * length;
    const int64_t position = cu_seqlens[s];
    return position < 0 ? 0 : position < tokens ? position : tokens;
  }

  // The first sequence that ends after `token`, which is the one that holds it; `count` if none does.
  RLK_HD int64_t of(int64_t token) const {
    if (cu_seqlens == nullptr) return token / length;
    int64_t low = 0, high = count;
    while (low < high) {
      const int64_t middle = (low + high) / 2;
      if (cu_seqlens[middle + 1] > token)
        high = middle;
      else
        low = middle + 1;
    }
    return low;
  }
};

}  // namespace rlk
