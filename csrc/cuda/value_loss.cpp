#include "value_loss.h"

#include "tensors.h"

namespace rlk {
namespace {

struct CudaValueLoss : Cuda {
  static void run(const Tensor& values, const ValueBatch& batch, float clip, const Denominator& denominator,
                  const std::optional<Tensor>& normalizer, const ValueResults& results) {
    TensorLauncher launch(values);
    launch_value_loss(launch, batch, clip, denominator, floats_of(normalizer), results);
  }
};

}  // namespace
}  // namespace rlk

STABLE_TORCH_LIBRARY_IMPL(rlkernels, RLK_CUDA_KEY, m) {
  m.impl("value_loss_forward.cuda", TORCH_BOX(&rlk::value_loss_forward<rlk::CudaValueLoss>));
}
