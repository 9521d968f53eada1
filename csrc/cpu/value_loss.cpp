#include "rlkernels/value_loss.h"

#include "cpu/value_loss.h"
#include "simd.h"
#include "token_losses.h"

namespace rlk {

template <>
void ValueLossKernels<Isa::RLK_ISA>::value_loss_lengths(const ValueLoss& p, int64_t* lengths, int64_t begin,
                                                        int64_t end) {
  for (int64_t s = begin; s < end; ++s)
    lengths[s] = count_scored(p.mask, p.sequences.start(s), p.sequences.start(s + 1));
}

template <>
void ValueLossKernels<Isa::RLK_ISA>::value_loss_sums(const ValueLoss& p, const int64_t* lengths, ValueSums* sums,
                                                     float* gradient, int64_t begin, int64_t end) {
  for (int64_t block = begin; block < end; ++block) {
    Sum loss, clipped, values, returns, return_squares, errors, error_squares, tokens;
    const int64_t last = std::min(p.sequences.tokens, (block + 1) * kLossBlock);
    for_each_piece(p.sequences, block * kLossBlock, last, [&](int64_t first, int64_t end, int64_t s) {
      const float share = p.mean_over_sequence ? 1.0f / static_cast<float>(std::max<int64_t>(lengths[s], 1)) : 1.0f;
      for_each_vector(first, end, [&](int64_t i, int64_t count) {
        const Mask scored = scored_tokens(p.mask, i, count);
        // What is not scored may hold anything, so it is replaced before any arithmetic.
        const auto scored_only = [&](Vec x) { return select(scored, x, Vec(0.0f)); };
        const Vec value = scored_only(load(p.values + i, count)), target = scored_only(load(p.returns + i, count));
        const Vec old = p.old_values != nullptr ? scored_only(load(p.old_values + i, count)) : value;
        const TokenValueLoss<Vec> t = value_token_loss(value, old, target, p.old_values != nullptr, Vec(p.clip));
        if (gradient != nullptr) store(gradient + i, t.derivative * Vec(share), count);
        loss += t.loss * Vec(share);
        clipped += t.clipped;
        values += value;
        returns += target;
        return_squares.add_square(target);
        errors += t.error;
        error_squares.add_square(t.error);
        tokens += scored_only(Vec(1.0f));
      });
    });
    sums[block] = {loss.total(),           clipped.total(), values.total(),        returns.total(),
                   return_squares.total(), errors.total(),  error_squares.total(), tokens.total()};
  }
}

}  // namespace rlk
