#include "cpu/masked.h"

#include "bindings.h"

namespace rlk {
namespace {

Masked masked(const Tensor& x, const std::optional<Tensor>& mask, int64_t rows, int64_t length) {
  return {floats(x), data_or_null<bool>(mask), rows, length};
}

std::tuple<Tensor, Tensor> masked_mean(Tensor x, std::optional<Tensor> mask) {
  const Masked problem = masked(x, mask, x.size(0), x.size(1));
  Tensor means = empty_floats({problem.rows}), scales = empty_floats({problem.rows});
  std::vector<MaskedSum> sums(problem.blocks());
  with_kernels<MaskedKernels>([&](auto kernels) {
    parallel(problem.blocks(), std::min(problem.length, Masked::kBlock),
             [&](int64_t begin, int64_t end) { kernels.masked_sums(problem, sums.data(), begin, end); });
  });
  float *mean = means.mutable_data_ptr<float>(), *scale = scales.mutable_data_ptr<float>();
  const int64_t per_row = problem.blocks_per_row();
  for (int64_t row = 0; row < problem.rows; ++row) {
    MaskedSum total = {0.0, 0.0};
    for (int64_t b = row * per_row; b < (row + 1) * per_row; ++b) {
      total.count += sums[b].count;
      total.sum += sums[b].sum;
    }
    const double count = std::max(total.count, 1.0);
    mean[row] = static_cast<float>(total.sum / count);
    scale[row] = static_cast<float>(1.0 / count);
  }
  return {means, scales};
}

Tensor masked_moments(Tensor x, std::optional<Tensor> mask) {
  const Masked problem = masked(x, mask, 1, x.numel());
  std::vector<Moments> parts(problem.blocks());
  with_kernels<MaskedKernels>([&](auto kernels) {
    parallel(problem.blocks(), Masked::kBlock,
             [&](int64_t begin, int64_t end) { kernels.masked_moments(problem, parts.data(), begin, end); });
  });
  Moments total = {0.0, 0.0, 0.0};
  for (const Moments& part : parts) total = combine(total, part);
  Tensor moments = torch::stable::empty({3}, ScalarType::Double);
  double* const out = moments.mutable_data_ptr<double>();
  out[0] = total.count;
  out[1] = total.mean;
  out[2] = std::sqrt(total.squares);
  return moments;
}

Tensor masked_whiten(Tensor x, std::optional<Tensor> mask, Tensor moments, bool shift_mean, double eps, bool unbiased,
                     bool eps_floor) {
  const double* const m = moments.const_data_ptr<double>();
  const Whitening whitening = whitening_of({m[0], m[1], m[2] * m[2]}, shift_mean, eps, unbiased, eps_floor);
  const Masked problem = masked(x, mask, 1, x.numel());
  Tensor whitened = empty_floats(x.sizes());
  with_kernels<MaskedKernels>([&](auto kernels) {
    parallel(problem.length, 1, [&](int64_t begin, int64_t end) {
      kernels.masked_whiten(problem, whitening, whitened.mutable_data_ptr<float>(), begin, end);
    });
  });
  return whitened;
}

}  // namespace
}  // namespace rlk

STABLE_TORCH_LIBRARY_IMPL(rlkernels, CPU, m) {
  m.impl("masked_mean.cpu", TORCH_BOX(&rlk::masked_mean));
  m.impl("masked_moments.cpu", TORCH_BOX(&rlk::masked_moments));
  m.impl("masked_whiten.cpu", TORCH_BOX(&rlk::masked_whiten));
}
