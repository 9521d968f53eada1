// What the CUDA ops share: access to tensors, and the launcher on their device. Shapes, dtypes and devices were checked
// in rlkernels/ops.
#pragma once

#include <torch/csrc/stable/accelerator.h>

#include <stdexcept>
#include <vector>

#include "inputs.h"
#include "launch.h"
#include "rlkernels/aggregation.h"
#include "rlkernels/ops.h"
#include "rlkernels/sequences.h"

// The emulation of the tests registers the same ops for CPU tensors.
#ifndef RLK_CUDA_KEY
#define RLK_CUDA_KEY CUDA
#endif

// PyTorch declares it only to those that link its CUDA libraries. It is weak, so that this module also loads with a
// PyTorch without CUDA, where none of its ops is ever called.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device, void** stream);

namespace rlk {

inline cudaStream_t current_stream(const Tensor& tensor) {
  if (aoti_torch_get_current_cuda_stream == nullptr) throw std::runtime_error("this PyTorch was built without CUDA");
  void* stream = nullptr;
  // By hand, since the macros for it have other names in other versions of PyTorch.
  if (aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream) != AOTI_TORCH_SUCCESS)
    throw std::runtime_error("PyTorch has no current CUDA stream for the device of the tensor");
  return static_cast<cudaStream_t>(stream);
}

// Makes the device of a tensor the current one, and launches on its current stream.
class TensorLauncher final : public Launcher {
 public:
  explicit TensorLauncher(const Tensor& tensor)
      : Launcher(current_stream(tensor)), tensor_(tensor), guard_(tensor.get_device_index()) {}

 private:
  void* room(int64_t bytes) override {
    rooms_.push_back(torch::stable::new_empty(tensor_, {bytes}, ScalarType::Byte));
    return rooms_.back().data_ptr();
  }

  Tensor tensor_;
  torch::stable::accelerator::DeviceGuard guard_;
  std::vector<Tensor> rooms_;
};

inline Dtype dtype_of(const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
      return Dtype::kFloat;
    case ScalarType::BFloat16:
      return Dtype::kBfloat16;
    case ScalarType::Half:
      return Dtype::kHalf;
    case ScalarType::Double:
      return Dtype::kDouble;
    case ScalarType::Long:
      return Dtype::kInt64;
    case ScalarType::Int:
      return Dtype::kInt32;
    case ScalarType::Short:
      return Dtype::kInt16;
    case ScalarType::Char:
      return Dtype::kInt8;
    default:
      return Dtype::kUint8;
  }
}

// Null where there is no tensor.
inline Floats floats_of(const std::optional<Tensor>& tensor) {
  return tensor ? Floats{tensor->const_data_ptr(), dtype_of(*tensor)} : Floats{};
}

inline Flags flags_of(const std::optional<Tensor>& tensor) {
  if (!tensor) return {};
  const int bytes = static_cast<int>(tensor->element_size());
  const ScalarType dtype = tensor->scalar_type();
  const bool number = dtype == ScalarType::Float || dtype == ScalarType::BFloat16 || dtype == ScalarType::Half ||
                      dtype == ScalarType::Double;
  return {tensor->const_data_ptr(), bytes, number};
}

// What the ops of rlkernels/ops.h ask of a device, but for `run`.
struct Cuda {
  using Array = Floats;
  using FlagArray = Flags;

  static Floats array(const std::optional<Tensor>& tensor) { return floats_of(tensor); }
  static Flags flags(const std::optional<Tensor>& tensor) { return flags_of(tensor); }
  static Sequences sequences(const Tensor& tensor, const std::optional<Tensor>& cu_seqlens) {
    if (!cu_seqlens) return {nullptr, tensor.numel(), tensor.size(0), tensor.size(1)};
    return {cu_seqlens->const_data_ptr<int32_t>(), tensor.numel(), cu_seqlens->numel() - 1, 0};
  }
  static Denominator denominator(const std::optional<Tensor>& normalizer, double normalizer_value,
                                 int64_t aggregation) {
    return {normalizer || normalizer_value > 0.0, static_cast<float>(normalizer_value), static_cast<int>(aggregation)};
  }
};

}  // namespace rlk
