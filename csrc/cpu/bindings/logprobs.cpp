#include "cpu/logprobs.h"

#include "logit_rows.h"

namespace rlk {
namespace {

LogitRows logit_rows(const Tensor& logits) {
  const DType dtype = dtype_of(logits);
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

std::vector<BlockSums> block_sums(const TokenLogprobs& problem, bool with_entropy) {
  const int64_t count = problem.logits.rows * problem.blocks_per_row();
  std::vector<BlockSums> sums(count);
  with_kernels<LogprobsKernels>([&](auto kernels) {
    parallel(count, std::min(problem.logits.vocab, TokenLogprobs::kBlock), [&](int64_t begin, int64_t end) {
      kernels.token_logprobs_sums(problem, with_entropy, sums.data(), begin, end);
    });
  });
  return sums;
}

std::tuple<Tensor, Tensor, Tensor> token_logprobs_forward(Tensor logits, Tensor token_ids, double temperature,
                                                          double softcap, int64_t ignore_index, bool return_entropy) {
  const TokenLogprobs problem = logprobs_problem(logits, token_ids, temperature, softcap, ignore_index);
  const int64_t rows = problem.logits.rows, blocks = problem.blocks_per_row();
  Tensor logprobs = empty_floats(token_ids.sizes());
  Tensor entropy = return_entropy ? empty_floats(token_ids.sizes()) : empty_floats({0});
  Tensor row_stats = empty_floats({2, logits.size(0), logits.size(1)});
  float* const entropy_data = return_entropy ? entropy.mutable_data_ptr<float>() : nullptr;
  const std::vector<BlockSums> sums = block_sums(problem, return_entropy);
  with_kernels<LogprobsKernels>([&](auto kernels) {
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
  with_kernels<LogprobsKernels>([&](auto kernels) {
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

TokenLogprobs tile_problem(const Tensor& logits, const Tensor& token_ids, int64_t vocab_start, double temperature,
                           double softcap, int64_t ignore_index) {
  return {tile_rows(logits),
          token_ids.const_data_ptr<int64_t>(),
          static_cast<float>(temperature),
          static_cast<float>(softcap),
          ignore_index,
          vocab_start};
}

Tensor token_logprobs_part(Tensor logits, Tensor token_ids, int64_t vocab_start, double temperature, double softcap,
                           int64_t ignore_index, bool return_entropy) {
  const TokenLogprobs problem = tile_problem(logits, token_ids, vocab_start, temperature, softcap, ignore_index);
  const int64_t rows = problem.logits.rows;
  Tensor parts = empty_floats({4, rows});
  const std::vector<BlockSums> sums = block_sums(problem, return_entropy);
  with_kernels<LogprobsKernels>([&](auto kernels) {
    parallel(rows, 64 * problem.blocks_per_row(), [&](int64_t begin, int64_t end) {
      kernels.token_logprobs_part(problem, return_entropy, sums.data(), parts.mutable_data_ptr<float>(), begin, end);
    });
  });
  return parts;
}

void token_logprobs_part_backward(std::optional<Tensor> grad_logprobs, std::optional<Tensor> grad_entropy,
                                  Tensor logits, Tensor token_ids, int64_t vocab_start, Tensor logprobs, Tensor entropy,
                                  Tensor row_stats, double temperature, double softcap, int64_t ignore_index,
                                  Tensor gradient) {
  if (gradient.scalar_type() != logits.scalar_type())
    throw std::invalid_argument("gradient must have the dtype of logits on a CPU");
  const TokenLogprobs problem = tile_problem(logits, token_ids, vocab_start, temperature, softcap, ignore_index);
  write_logits_gradient(grad_logprobs, grad_entropy, problem, logprobs, entropy, row_stats, tile_rows(gradient));
}

}  // namespace
}  // namespace rlk

STABLE_TORCH_LIBRARY_IMPL(rlkernels, CPU, m) {
  m.impl("token_logprobs_forward.cpu", TORCH_BOX(&rlk::token_logprobs_forward));
  m.impl("token_logprobs_backward.cpu", TORCH_BOX(&rlk::token_logprobs_backward));
  m.impl("token_logprobs_backward_.cpu", TORCH_BOX(&rlk::token_logprobs_backward_));
  m.impl("token_logprobs_part.cpu", TORCH_BOX(&rlk::token_logprobs_part));
  m.impl("token_logprobs_part_backward.cpu", TORCH_BOX(&rlk::token_logprobs_part_backward));
}
