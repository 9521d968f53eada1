// The extension module: registers the CPU kernels as the `.cpu` overloads of the ops that rlkernels/ops defines.
// Shapes, dtypes and devices were checked there; the values in token_ids and cu_seqlens are checked here.

#include <pybind11/pybind11.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdlib>
#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "cpu/kernels.h"

namespace rlk {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// With fewer elements than this per thread, waking a thread costs more than it saves.
constexpr int64_t kGrain = 16384;

constexpr const char* kNames[] = {"baseline", "avx2", "avx512"};

bool supported(Isa isa) {
#if defined(__x86_64__)
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  return isa == Isa::kBaseline || (isa == Isa::kAvx2 ? avx2 : avx512);
#else
  return isa == Isa::kBaseline;
#endif
}

// The best the processor has, or the one named by RLKERNELS_CPU_ISA, with which the tests reach the others.
Isa choose_instruction_set() {
  const char* wanted = std::getenv("RLKERNELS_CPU_ISA");
  for (const Isa isa : {Isa::kAvx512, Isa::kAvx2, Isa::kBaseline})
    if (supported(isa) && (wanted == nullptr || std::string(wanted) == kNames[static_cast<int>(isa)])) return isa;
  std::string names;
  for (const Isa isa : {Isa::kAvx512, Isa::kAvx2, Isa::kBaseline})
    if (supported(isa)) names += std::string(names.empty() ? "" : ", ") + kNames[static_cast<int>(isa)];
  throw std::invalid_argument("RLKERNELS_CPU_ISA must be one of those this processor has: " + names + "; got '" +
                              wanted + "'");
}

Isa instruction_set() {
  static const Isa isa = choose_instruction_set();
  return isa;
}

template <typename Function>
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

// Calls function(begin, end) on several threads for parts of `count` items of about `item_size` elements each.
template <typename Function>
void parallel(int64_t count, int64_t item_size, Function function) {
  const int64_t grain = std::max<int64_t>(1, kGrain / std::max<int64_t>(1, item_size));
  torch::stable::parallel_for(0, count, grain, function);
}

const float* floats(const Tensor& tensor) { return tensor.const_data_ptr<float>(); }

template <typename T>
const T* data_or_null(const std::optional<Tensor>& tensor) {
  return tensor ? tensor->const_data_ptr<T>() : nullptr;
}

Tensor empty_floats(torch::headeronly::IntHeaderOnlyArrayRef sizes) {
  return torch::stable::empty(sizes, ScalarType::Float);
}

LogitRows logit_rows(const Tensor& logits) {
  DType dtype = DType::kFloat32;
  if (logits.scalar_type() == ScalarType::BFloat16) dtype = DType::kBFloat16;
  if (logits.scalar_type() == ScalarType::Half) dtype = DType::kFloat16;
  return {logits.data_ptr(), dtype,           logits.size(0) * logits.size(1), logits.size(1), logits.size(2),
          logits.stride(0),  logits.stride(1)};
}

TokenLogprobs logprobs_problem(const Tensor& logits, const Tensor& token_ids, double temperature, double softcap,
                               int64_t ignore_index) {
  const TokenLogprobs problem = {logit_rows(logits), token_ids.const_data_ptr<int64_t>(),
                                 static_cast<float>(temperature), static_cast<float>(softcap), ignore_index};
  const int64_t vocab = problem.logits.vocab;
  for (int64_t row = 0; row < problem.logits.rows; ++row) {
    const int64_t id = problem.token_ids[row];
    if ((id < 0 || id >= vocab) && id != ignore_index)
      throw std::invalid_argument("token_ids must be in [0, " + std::to_string(vocab) + ") or ignore_index (" +
                                  std::to_string(ignore_index) + "); got " + std::to_string(id) + " at row " +
                                  std::to_string(row));
  }
  return problem;
}

std::tuple<Tensor, Tensor, Tensor> token_logprobs_forward(Tensor logits, Tensor token_ids, double temperature,
                                                          double softcap, int64_t ignore_index, bool return_entropy) {
  const TokenLogprobs problem = logprobs_problem(logits, token_ids, temperature, softcap, ignore_index);
  const int64_t rows = problem.logits.rows, blocks = problem.blocks_per_row();
  Tensor logprobs = empty_floats(token_ids.sizes());
  Tensor entropy = return_entropy ? empty_floats(token_ids.sizes()) : empty_floats({0});
  Tensor row_stats = empty_floats({2, logits.size(0), logits.size(1)});
  float* const entropy_data = return_entropy ? entropy.mutable_data_ptr<float>() : nullptr;
  std::vector<BlockSums> sums(rows * blocks);
  with_kernels([&](auto kernels) {
    parallel(rows * blocks, std::min(problem.logits.vocab, TokenLogprobs::kBlock), [&](int64_t begin, int64_t end) {
      kernels.token_logprobs_sums(problem, return_entropy, sums.data(), begin, end);
    });
    parallel(rows, 64 * blocks, [&](int64_t begin, int64_t end) {
      kernels.token_logprobs_finish(problem, sums.data(), logprobs.mutable_data_ptr<float>(), entropy_data,
                                    row_stats.mutable_data_ptr<float>(), begin, end);
    });
  });
  return {logprobs, entropy, row_stats};
}

void write_logits_gradient(const std::optional<Tensor>& grad_logprobs, const std::optional<Tensor>& grad_entropy,
                           const TokenLogprobs& problem, const Tensor& logprobs, const Tensor& entropy,
                           const Tensor& row_stats, const LogitRows& gradient) {
  with_kernels([&](auto kernels) {
    parallel(problem.logits.rows * problem.blocks_per_row(), std::min(problem.logits.vocab, TokenLogprobs::kBlock),
             [&](int64_t begin, int64_t end) {
               kernels.token_logprobs_backward(problem, data_or_null<float>(grad_logprobs),
                                               data_or_null<float>(grad_entropy), floats(logprobs), floats(entropy),
                                               floats(row_stats), gradient, begin, end);
             });
  });
}

Tensor token_logprobs_backward(std::optional<Tensor> grad_logprobs, std::optional<Tensor> grad_entropy, Tensor logits,
                               Tensor token_ids, Tensor logprobs, Tensor entropy, Tensor row_stats, double temperature,
                               double softcap, int64_t ignore_index) {
  const TokenLogprobs problem = logprobs_problem(logits, token_ids, temperature, softcap, ignore_index);
  Tensor gradient = torch::stable::empty(logits.sizes(), logits.scalar_type());
  write_logits_gradient(grad_logprobs, grad_entropy, problem, logprobs, entropy, row_stats, logit_rows(gradient));
  return gradient;
}

void token_logprobs_backward_(std::optional<Tensor> grad_logprobs, std::optional<Tensor> grad_entropy, Tensor logits,
                              Tensor token_ids, Tensor logprobs, Tensor entropy, Tensor row_stats, double temperature,
                              double softcap, int64_t ignore_index) {
  const TokenLogprobs problem = logprobs_problem(logits, token_ids, temperature, softcap, ignore_index);
  write_logits_gradient(grad_logprobs, grad_entropy, problem, logprobs, entropy, row_stats, problem.logits);
}

Tensor kl_penalty_forward(Tensor logprobs, Tensor ref_logprobs, int64_t estimator, bool straight_through,
                          double log_ratio_clamp, double value_clamp) {
  const KlPenalty options = {static_cast<int>(estimator), straight_through, static_cast<float>(log_ratio_clamp),
                             static_cast<float>(value_clamp)};
  Tensor penalty = empty_floats(logprobs.sizes());
  with_kernels([&](auto kernels) {
    parallel(logprobs.numel(), 1, [&](int64_t begin, int64_t end) {
      kernels.kl_penalty_forward(options, floats(logprobs), floats(ref_logprobs), penalty.mutable_data_ptr<float>(),
                                 begin, end);
    });
  });
  return penalty;
}

Tensor kl_penalty_backward(Tensor grad, Tensor logprobs, Tensor ref_logprobs, int64_t estimator, bool straight_through,
                           double log_ratio_clamp, double value_clamp) {
  const KlPenalty options = {static_cast<int>(estimator), straight_through, static_cast<float>(log_ratio_clamp),
                             static_cast<float>(value_clamp)};
  Tensor grad_logprobs = empty_floats(logprobs.sizes());
  with_kernels([&](auto kernels) {
    parallel(logprobs.numel(), 1, [&](int64_t begin, int64_t end) {
      kernels.kl_penalty_backward(options, floats(grad), floats(logprobs), floats(ref_logprobs),
                                  grad_logprobs.mutable_data_ptr<float>(), begin, end);
    });
  });
  return grad_logprobs;
}

std::tuple<Tensor, Tensor> group_advantages(Tensor rewards, std::optional<Tensor> weights, std::optional<Tensor> order,
                                            std::optional<Tensor> offsets, int64_t group_size, int64_t baseline,
                                            int64_t scale, double eps, bool normalize_before_sum, bool keep_singleton) {
  const GroupAdvantages problem = {floats(rewards),
                                   data_or_null<float>(weights),
                                   data_or_null<int64_t>(order),
                                   data_or_null<int64_t>(offsets),
                                   rewards.size(0),
                                   rewards.size(1),
                                   group_size,
                                   static_cast<int>(baseline),
                                   static_cast<int>(scale),
                                   static_cast<float>(eps),
                                   normalize_before_sum,
                                   keep_singleton};
  Tensor advantages = empty_floats({rewards.size(0)});
  Tensor signal = torch::stable::empty({rewards.size(0)}, ScalarType::Bool);
  with_kernels([&](auto kernels) {
    kernels.group_advantages(problem, advantages.mutable_data_ptr<float>(), signal.mutable_data_ptr<bool>());
  });
  return {advantages, signal};
}

void check_cu_seqlens(const int32_t* cu_seqlens, int64_t sequences, int64_t tokens) {
  const auto refuse = [](const std::string& wanted, int64_t got, int64_t position) {
    throw std::invalid_argument("cu_seqlens must " + wanted + "; got " + std::to_string(got) + " at position " +
                                std::to_string(position));
  };
  if (cu_seqlens[0] != 0) refuse("start with 0", cu_seqlens[0], 0);
  for (int64_t s = 0; s < sequences; ++s)
    if (cu_seqlens[s + 1] < cu_seqlens[s]) refuse("not decrease", cu_seqlens[s + 1], s + 1);
  if (cu_seqlens[sequences] != tokens)
    refuse("end with the number of tokens, " + std::to_string(tokens), cu_seqlens[sequences], sequences);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> policy_loss_forward(
    Tensor logprobs, std::optional<Tensor> old_logprobs, Tensor advantages, std::optional<Tensor> mask,
    std::optional<Tensor> cu_seqlens, std::optional<Tensor> ref_logprobs, std::optional<Tensor> normalizer,
    double normalizer_value, int64_t objective, int64_t aggregation, double clip_low, double clip_high,
    double dual_clip, double log_ratio_clamp, double kl_coef, int64_t kl_estimator, bool kl_straight_through) {
  PolicyLoss problem = {};
  problem.logprobs = floats(logprobs);
  problem.old_logprobs = data_or_null<float>(old_logprobs);
  problem.ref_logprobs = data_or_null<float>(ref_logprobs);
  problem.mask = data_or_null<bool>(mask);
  problem.advantages = floats(advantages);
  problem.advantage_per_token = advantages.dim() == logprobs.dim() && advantages.numel() == logprobs.numel();
  problem.cu_seqlens = data_or_null<int32_t>(cu_seqlens);
  problem.tokens = logprobs.numel();
  problem.sequences = cu_seqlens ? cu_seqlens->numel() - 1 : logprobs.size(0);
  problem.sequence_length = cu_seqlens ? 0 : logprobs.size(1);
  problem.mean_over_sequence = aggregation == kSeqMeanTokenMean;
  problem.options =
      make_policy_options(static_cast<int>(objective), ref_logprobs.has_value(), clip_low, clip_high, dual_clip,
                          log_ratio_clamp, kl_coef, static_cast<int>(kl_estimator), kl_straight_through);
  if (cu_seqlens) check_cu_seqlens(problem.cu_seqlens, problem.sequences, problem.tokens);

  Tensor loss = empty_floats({}), metrics = empty_floats({kPolicyMetrics}), scale = empty_floats({});
  Tensor gradient = empty_floats(logprobs.sizes());
  std::vector<int64_t> lengths(problem.sequences);
  std::vector<PolicySums> sums(problem.blocks());
  with_kernels([&](auto kernels) {
    parallel(problem.sequences, problem.tokens / std::max<int64_t>(1, problem.sequences),
             [&](int64_t begin, int64_t end) { kernels.policy_loss_lengths(problem, lengths.data(), begin, end); });
    parallel(problem.blocks(), PolicyLoss::kBlock, [&](int64_t begin, int64_t end) {
      kernels.policy_loss_sums(problem, lengths.data(), sums.data(), gradient.mutable_data_ptr<float>(), begin, end);
    });
  });

  int64_t num_tokens = 0, num_sequences = 0;
  for (const int64_t length : lengths) {
    num_tokens += length;
    num_sequences += length > 0;
  }
  PolicySums total = {};
  for (const PolicySums& block : sums) {
    total.loss += block.loss;
    for (int k = 0; k < kNumTokens; ++k) total.metrics[k] += block.metrics[k];
  }
  double denominator = 1.0;
  if (normalizer)
    denominator = *floats(*normalizer);
  else if (normalizer_value > 0)
    denominator = normalizer_value;
  else if (aggregation == kTokenMean)
    denominator = static_cast<double>(num_tokens);
  else if (aggregation != kTokenSum)
    denominator = static_cast<double>(num_sequences);

  const bool scored = num_tokens > 0;
  *loss.mutable_data_ptr<float>() = scored ? static_cast<float>(total.loss / denominator) : 0.0f;
  *scale.mutable_data_ptr<float>() = scored ? static_cast<float>(1.0 / denominator) : 0.0f;
  float* const metric = metrics.mutable_data_ptr<float>();
  for (int k = 0; k < kNumTokens; ++k)
    metric[k] = scored ? static_cast<float>(total.metrics[k] / static_cast<double>(num_tokens)) : 0.0f;
  metric[kNumTokens] = static_cast<float>(num_tokens);
  return {loss, metrics, gradient, scale};
}

}  // namespace
}  // namespace rlk

STABLE_TORCH_LIBRARY_IMPL(rlkernels, CPU, m) {
  m.impl("token_logprobs_forward.cpu", TORCH_BOX(&rlk::token_logprobs_forward));
  m.impl("token_logprobs_backward.cpu", TORCH_BOX(&rlk::token_logprobs_backward));
  m.impl("token_logprobs_backward_.cpu", TORCH_BOX(&rlk::token_logprobs_backward_));
  m.impl("kl_penalty_forward.cpu", TORCH_BOX(&rlk::kl_penalty_forward));
  m.impl("kl_penalty_backward.cpu", TORCH_BOX(&rlk::kl_penalty_backward));
  m.impl("group_advantages.cpu", TORCH_BOX(&rlk::group_advantages));
  m.impl("policy_loss_forward.cpu", TORCH_BOX(&rlk::policy_loss_forward));
}

PYBIND11_MODULE(_C, m) {
  rlk::instruction_set();  // a wrong RLKERNELS_CPU_ISA fails at import
  m.def("instruction_set", [] { return rlk::kNames[static_cast<int>(rlk::instruction_set())]; });
}
