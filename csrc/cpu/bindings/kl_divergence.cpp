#include "cpu/kl_divergence.h"

#include "logit_rows.h"

namespace rlk {
namespace {

KlDivergence divergence_problem(const Tensor& student, const Tensor& teacher, const Tensor& student_stats,
                                const Tensor& teacher_stats, int64_t kind, double beta, double temperature,
                                double teacher_temperature, double softcap, double teacher_softcap) {
  return {
      {tile_rows(student), floats(student_stats), static_cast<float>(temperature), static_cast<float>(softcap)},
      {tile_rows(teacher), floats(teacher_stats), static_cast<float>(teacher_temperature),
       static_cast<float>(teacher_softcap)},
      static_cast<int>(kind),
      static_cast<float>(beta),
      static_cast<float>(1.0 - beta),
  };
}

Tensor kl_divergence_part(Tensor student, Tensor teacher, Tensor student_stats, Tensor teacher_stats, int64_t kind,
                          double beta, double temperature, double teacher_temperature, double softcap,
                          double teacher_softcap) {
  const KlDivergence problem = divergence_problem(student, teacher, student_stats, teacher_stats, kind, beta,
                                                  temperature, teacher_temperature, softcap, teacher_softcap);
  const int64_t rows = student.size(0), blocks = problem.blocks_per_row();
  Tensor parts = empty_floats({3, rows});
  std::vector<DivergenceSums> sums(rows * blocks);
  with_kernels<KlDivergenceKernels>([&](auto kernels) {
    parallel(rows * blocks, std::min(student.size(1), KlDivergence::kBlock),
             [&](int64_t begin, int64_t end) { kernels.kl_divergence_sums(problem, sums.data(), begin, end); });
  });
  float* const out = parts.mutable_data_ptr<float>();
  for (int64_t row = 0; row < rows; ++row) {
    DivergenceSums sum = {0.0, 0.0, 0.0};
    for (int64_t b = 0; b < blocks; ++b) {
      sum.divergence += sums[row * blocks + b].divergence;
      sum.moment += sums[row * blocks + b].moment;
      sum.total += sums[row * blocks + b].total;
    }
    out[row] = static_cast<float>(sum.divergence);
    out[rows + row] = static_cast<float>(sum.moment);
    out[2 * rows + row] = static_cast<float>(sum.total);
  }
  return parts;
}

void kl_divergence_part_backward(Tensor grad, Tensor centre, Tensor student, Tensor teacher, Tensor student_stats,
                                 Tensor teacher_stats, int64_t kind, double beta, double temperature,
                                 double teacher_temperature, double softcap, double teacher_softcap, Tensor gradient) {
  if (gradient.scalar_type() != student.scalar_type())
    throw std::invalid_argument("gradient must have the dtype of the student's logits on a CPU");
  const KlDivergence problem = divergence_problem(student, teacher, student_stats, teacher_stats, kind, beta,
                                                  temperature, teacher_temperature, softcap, teacher_softcap);
  with_kernels<KlDivergenceKernels>([&](auto kernels) {
    parallel(student.size(0) * problem.blocks_per_row(), std::min(student.size(1), KlDivergence::kBlock),
             [&](int64_t begin, int64_t end) {
               kernels.kl_divergence_backward(problem, floats(grad), floats(centre), tile_rows(gradient), begin, end);
             });
  });
}

}  // namespace
}  // namespace rlk

STABLE_TORCH_LIBRARY_IMPL(rlkernels, CPU, m) {
  m.impl("kl_divergence_part.cpu", TORCH_BOX(&rlk::kl_divergence_part));
  m.impl("kl_divergence_part_backward.cpu", TORCH_BOX(&rlk::kl_divergence_part_backward));
}
