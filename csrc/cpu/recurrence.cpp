#include "rlkernels/recurrence.h"

#include <array>
#include <bit>
#include <utility>

#include "cpu/recurrence.h"
#include "simd.h"

namespace rlk {
namespace {

constexpr int kSteps = std::countr_zero(static_cast<unsigned>(kLanes));

// How the lanes of y[i] = b[i] + a[i] y[i+1] depend on each other: across 1, 2, 4 ... lanes, and on what lies behind
// the last lane.
struct Decay {
  std::array<Vec, kSteps> across;
  Vec behind;
};

template <size_t... kStep>
Decay decay_of(Vec a, std::index_sequence<kStep...>) {
  Decay decay;
  ((decay.across[kStep] = a, a = a * shift_down<1 << kStep>(a, Vec(1.0f))), ...);
  decay.behind = a;
  return decay;
}

inline Decay decay_of(Vec a) { return decay_of(a, std::make_index_sequence<kSteps>()); }

// For one a in all lanes. The float rounding of each squaring would go in one direction and double with the next.
inline Decay decay_of(float a) {
  double powers[kLanes + 1] = {1.0};
  for (int i = 1; i <= kLanes; ++i) powers[i] = powers[i - 1] * a;
  Decay decay;
  for (int step = 0; step < kSteps; ++step) decay.across[step] = static_cast<float>(powers[1 << step]);
  float behind[kLanes];
  for (int i = 0; i < kLanes; ++i) behind[i] = static_cast<float>(powers[kLanes - i]);
  decay.behind = load(behind);
  return decay;
}

// y of all lanes, as if 0 lay behind the last. In log2(lanes) steps; only what is done with `behind`, one multiply-add,
// has to wait for the vector after it.
template <size_t... kStep>
Vec scan(const Decay& decay, Vec b, std::index_sequence<kStep...>) {
  ((b = b + decay.across[kStep] * shift_down<1 << kStep>(b, Vec(0.0f))), ...);
  return b;
}

inline Vec scan(const Decay& decay, Vec b) { return scan(decay, b, std::make_index_sequence<kSteps>()); }

// One sequence, from its end to its beginning. A vector takes the scan if all its tokens are scored and no episode ends
// in it, and is passed over if none is scored. Any other goes token by token. Which way a token goes depends on its
// sequence alone.
template <int kKind>
class Sweep {
 public:
  Sweep(const Recurrence& problem, float* advantages, float* returns, float bootstrap)
      : p_(problem),
        o_(problem.options),
        advantages_(advantages),
        returns_(returns),
        constant_decay_(decay_of(o_.decay)),
        next_value_(bootstrap),
        y_(starts_with_bootstrap(kKind) ? bootstrap : 0.0f) {}

  template <bool kSums>
  void run(int64_t begin, int64_t end) {
    int64_t i = end;
    for (; i - kLanes >= begin;) {
      i -= kLanes;
      const bool ends = p_.dones != nullptr && !none_set(p_.dones + i);
      if (p_.mask == nullptr ? !ends : !ends && all_set(p_.mask + i)) {
        vector<kSums>(i);
      } else if (!ends && none_set(p_.mask + i)) {
        if (has_advantages(kKind)) store(advantages_ + i, Vec(0.0f));
        store(returns_ + i, Vec(0.0f));
      } else {
        tokens<kSums>(i, i + kLanes);
      }
    }
    tokens<kSums>(begin, i);
  }

  AdvantageSums sums() const {
    return {count_ + vector_count_, sum_ + vector_sum_.total(), squares_ + vector_squares_.total()};
  }

 private:
  template <bool kSums>
  void vector(int64_t i) {
    const Vec zero = 0.0f;
    const Vec value = kKind != kDiscountedReturns ? load(p_.values + i) : zero;
    const Vec logprob = kKind == kVtrace ? load(p_.logprobs + i) : zero;
    const Vec behavior = kKind == kVtrace ? load(p_.behavior_logprobs + i) : zero;
    const RecurrenceTerm<Vec> term =
        recurrence_term(o_, kKind, load(p_.rewards + i), value, shift_down<1>(value, next_value_), logprob, behavior);
    const Decay decay = kKind == kVtrace ? decay_of(term.a) : constant_decay_;
    const Vec y = scan(decay, term.b) + decay.behind * broadcast_first(y_);
    if (has_advantages(kKind)) {
      const Vec advantage = recurrence_advantage(o_, kKind, term, y, shift_down<1>(y, y_));
      store(advantages_ + i, advantage);
      if (kSums) {
        vector_count_ += kLanes;
        vector_sum_ += advantage;
        vector_squares_.add_square(advantage);
      }
    }
    store(returns_ + i, recurrence_return(kKind, value, y));
    next_value_ = value;
    y_ = y;
  }

  template <bool kSums>
  void tokens(int64_t begin, int64_t end) {
    float next_value = first(next_value_), y_next = first(y_);
    for (int64_t t = end - 1; t >= begin; --t) {
      if (p_.dones != nullptr && p_.dones[t]) next_value = y_next = 0.0f;
      float advantage = 0.0f, result = 0.0f;
      if (p_.mask == nullptr || p_.mask[t]) {
        const float value = kKind != kDiscountedReturns ? p_.values[t] : 0.0f;
        const RecurrenceTerm<float> term =
            recurrence_term(o_, kKind, p_.rewards[t], value, next_value, kKind == kVtrace ? p_.logprobs[t] : 0.0f,
                            kKind == kVtrace ? p_.behavior_logprobs[t] : 0.0f);
        const float y = term.b + term.a * y_next;
        advantage = recurrence_advantage(o_, kKind, term, y, y_next);
        result = recurrence_return(kKind, value, y);
        next_value = value;
        y_next = y;
        if (kSums) {
          count_ += 1;
          sum_ += advantage;
          squares_ += static_cast<double>(advantage) * advantage;
        }
      }
      if (has_advantages(kKind)) advantages_[t] = advantage;
      returns_[t] = result;
    }
    next_value_ = next_value;
    y_ = y_next;
  }

  const Recurrence& p_;
  const RecurrenceOptions o_;
  float* const advantages_;
  float* const returns_;
  const Decay constant_decay_;
  // The first lane: of the token that was last gone through.
  Vec next_value_, y_;
  int64_t count_ = 0, vector_count_ = 0;
  double sum_ = 0.0, squares_ = 0.0;
  Sum vector_sum_, vector_squares_;
};

template <int kKind>
void sweep(const Recurrence& problem, float* advantages, float* returns, AdvantageSums* sums, int64_t begin,
           int64_t end) {
  const Sequences& sequences = problem.sequences;
  int64_t s = sequences.of(begin);
  if (sequences.start(s) < begin) ++s;
  for (; s < sequences.count && sequences.start(s) < end; ++s) {
    Sweep<kKind> sweep(problem, advantages, returns,
                       problem.bootstrap_values != nullptr ? problem.bootstrap_values[s] : 0.0f);
    if (sums != nullptr) {
      sweep.template run<true>(sequences.start(s), sequences.start(s + 1));
      sums[s] = sweep.sums();
    } else {
      sweep.template run<false>(sequences.start(s), sequences.start(s + 1));
    }
  }
}

}  // namespace

template <>
void RecurrenceKernels<Isa::RLK_ISA>::recurrence(const Recurrence& problem, float* advantages, float* returns,
                                                 AdvantageSums* sums, int64_t begin, int64_t end) {
  // Where rewards are few, returns decay through all the denormals on their way back.
  const FlushDenormals flush;
  switch (problem.kind) {
    case kGae:
      return sweep<kGae>(problem, advantages, returns, sums, begin, end);
    case kDiscountedReturns:
      return sweep<kDiscountedReturns>(problem, advantages, returns, sums, begin, end);
    case kTdLambda:
      return sweep<kTdLambda>(problem, advantages, returns, sums, begin, end);
    default:
      return sweep<kVtrace>(problem, advantages, returns, sums, begin, end);
  }
}

template <>
void RecurrenceKernels<Isa::RLK_ISA>::whiten(const Recurrence& problem, const AdvantageWhitening& whitening,
                                             float* advantages, int64_t begin, int64_t end) {
  for_each_vector(begin, end, [&](int64_t i, int64_t count) {
    const Mask scored = problem.mask != nullptr ? load_mask(problem.mask + i, count) : first_lanes(count);
    const Vec whitened = whiten_advantage(whitening, load(advantages + i, count));
    store(advantages + i, select(scored, whitened, Vec(0.0f)), count);
  });
}

}  // namespace rlk
