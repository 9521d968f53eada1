#include "recurrence.h"

#include "tensors.h"

namespace rlk {
namespace {

struct CudaRecurrence : Cuda {
  static void run(const Tensor& rewards, const RecurrenceInputs<Floats, Flags>& inputs, int kind,
                  const RecurrenceOptions& options, bool whiten, float* advantages, float* returns) {
    if (inputs.sequences.tokens == 0) return;
    TensorLauncher launch(rewards);
    launch_recurrence(launch, {inputs, nullptr, options, advantages, returns}, kind, whiten);
  }
};

}  // namespace
}  // namespace rlk

STABLE_TORCH_LIBRARY_IMPL(rlkernels, RLK_CUDA_KEY, m) {
  m.impl("recurrence.cuda", TORCH_BOX(&rlk::recurrence<rlk::CudaRecurrence>));
}
