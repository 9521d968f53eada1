#include "rlkernels/policy_loss.h"

#include <array>
#include <utility>

#include "cpu/policy_loss.h"
#include "simd.h"
#include "token_losses.h"

namespace rlk {
namespace {

// Tokens [i, i + count) of sequence s. What is not scored may hold anything, so it is replaced before any arithmetic.
inline TokenInputs<Vec> load_tokens(const PolicyLoss& p, Mask scored, int64_t i, int64_t count, int64_t s) {
  const auto scored_only = [&](Vec x) { return select(scored, x, Vec(0.0f)); };
  TokenInputs<Vec> x = {};
  x.logprob = scored_only(load(p.logprobs + i, count));
  x.old_logprob = p.old_logprobs != nullptr ? scored_only(load(p.old_logprobs + i, count)) : x.logprob;
  if (p.ref_logprobs != nullptr) x.ref_logprob = scored_only(load(p.ref_logprobs + i, count));
  if (p.sampler_logprobs != nullptr) x.sampler_logprob = scored_only(load(p.sampler_logprobs + i, count));
  if (p.entropy != nullptr) x.entropy = scored_only(load(p.entropy + i, count));
  x.advantage = scored_only(p.advantage_per_token ? load(p.advantages + i, count) : Vec(p.advantages[s]));
  return x;
}

// The problem is a copy, which no store of a gradient can change: what it holds then stays in registers.
template <int kObjective>
PolicySums policy_loss_block(PolicyLoss p, const SequenceFactors* factors, float* gradient, float* entropy_gradient,
                             int64_t begin, int64_t end) {
  Sum loss, means[kPolicyMeans], tokens;
  const Vec zero = 0.0f, one = 1.0f;
  for_each_piece(p.sequences, begin, end, [&](int64_t begin, int64_t end, int64_t s) {
    const SequenceFactors whole = factors != nullptr ? factors[s] : SequenceFactors{};
    const float share = !p.mean_over_sequence ? 1.0f : whole.length > 0.0f ? 1.0f / whole.length : 0.0f;
    Vec piece_loss = zero, piece_tokens = zero, piece[kPolicyMeans];
    for (Vec& sum : piece) sum = zero;
    for_each_vector(begin, end, [&](int64_t i, int64_t count) __attribute__((always_inline)) {
      const Mask scored = scored_tokens(p.mask, i, count);
      const auto scored_only = [&](Vec x) { return select(scored, x, zero); };
      const TokenInputs<Vec> x = load_tokens(p, scored, i, count, s);
      const TokenLoss<Vec> t = policy_token_loss<kObjective>(p.options, x, whole);
      piece_tokens += scored_only(one);
      piece_loss += scored_only(t.loss * Vec(share));
      if (gradient != nullptr) store(gradient + i, scored_only(t.derivative * Vec(share)), count);
      if (entropy_gradient != nullptr)
        store(entropy_gradient + i, scored_only(Vec(-p.options.entropy_coef * share)), count);
      piece[kRatioMean] += scored_only(t.ratio);
      piece[kClipLow] += t.clipped_low;
      piece[kClipHigh] += t.clipped_high;
      piece[kApproxKl] += t.approx_kl;
      piece[kRefKl] += t.ref_kl;
      piece[kEntropy] += x.entropy;
      if (p.sampler_logprobs != nullptr) {
        piece[kSamplerWeight] += scored_only(t.weight);
        piece[kSamplerCapped] += scored_only(t.capped);
      }
    });
    loss += piece_loss;
    tokens += piece_tokens;
    for (int k = 0; k < kPolicyMeans; ++k) means[k] += piece[k];
  });
  PolicySums sums = {loss.total(), {}, tokens.total()};
  for (int k = 0; k < kPolicyMeans; ++k) sums.means[k] = means[k].total();
  if (p.sampler_logprobs == nullptr) sums.means[kSamplerWeight] = sums.tokens;
  return sums;
}

using Block = PolicySums (*)(PolicyLoss, const SequenceFactors*, float*, float*, int64_t, int64_t);

template <size_t... kObjective>
constexpr std::array<Block, sizeof...(kObjective)> blocks_of(std::index_sequence<kObjective...>) {
  return {policy_loss_block<kObjective>...};
}

}  // namespace

template <>
void PolicyLossKernels<Isa::RLK_ISA>::policy_loss_sequences(const PolicyLoss& p, SequenceFactors* factors,
                                                            int64_t begin, int64_t end) {
  for (int64_t s = begin; s < end; ++s) {
    const int64_t first = p.sequences.start(s), last = p.sequences.start(s + 1);
    Sum log_ratio, log_weight, advantage;
    if (p.options.needs_sequences()) {
      for_each_vector(first, last, [&](int64_t i, int64_t count) {
        const Mask scored = scored_tokens(p.mask, i, count);
        const TokenInputs<Vec> x = load_tokens(p, scored, i, count, s);
        const SequenceTerms<Vec> terms = policy_sequence_terms(p.options, x);
        log_ratio += terms.log_ratio;
        log_weight += select(scored, terms.log_weight, Vec(0.0f));
        advantage += x.advantage;
      });
    }
    factors[s] = policy_sequence_factors(p.options, static_cast<double>(count_scored(p.mask, first, last)),
                                         log_ratio.total(), log_weight.total(), advantage.total());
  }
}

template <>
void PolicyLossKernels<Isa::RLK_ISA>::policy_loss_sums(const PolicyLoss& p, const SequenceFactors* factors,
                                                       PolicySums* sums, float* gradient, float* entropy_gradient,
                                                       int64_t begin, int64_t end) {
  static constexpr auto kBlocks = blocks_of(std::make_index_sequence<kObjectives>());
  for (int64_t block = begin; block < end; ++block)
    sums[block] = kBlocks[p.options.objective](p, factors, gradient, entropy_gradient, block * kLossBlock,
                                               std::min(p.sequences.tokens, (block + 1) * kLossBlock));
}

}  // namespace rlk
