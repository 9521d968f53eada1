// What the launchers share: the stream to launch on, and the registration key.
#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>

#include "rlkernels/sequences.h"

// The emulation of the tests registers the same launchers for CPU tensors.
#ifndef RLK_CUDA_KEY
#define RLK_CUDA_KEY CUDA
#endif

// PyTorch declares it only to those that link its CUDA libraries. Weak, so that this module also loads beside a PyTorch
// without CUDA, where no launcher is ever called.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device, void** stream);

namespace rlk {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Makes the device of a tensor the current one, and launches on its current stream.
class Launcher {
 public:
  explicit Launcher(const Tensor& tensor) : guard_(tensor.get_device_index()) {
    if (aoti_torch_get_current_cuda_stream == nullptr) throw std::runtime_error("this PyTorch was built without CUDA");
    void* stream = nullptr;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream));
    stream_ = static_cast<cudaStream_t>(stream);
  }

  template <typename... Parameters, typename... Arguments>
  void operator()(void (*kernel)(Parameters...), int64_t blocks, int threads, const Arguments&... arguments) const {
    if (blocks == 0) return;
    if (blocks > INT32_MAX)
      throw std::runtime_error("a CUDA grid of " + std::to_string(blocks) + " blocks is too large");
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3(static_cast<unsigned>(blocks));
    config.blockDim = dim3(static_cast<unsigned>(threads));
    config.stream = stream_;
    const cudaError_t error = cudaLaunchKernelEx(&config, kernel, Parameters(arguments)...);
    if (error != cudaSuccess) throw std::runtime_error(std::string("CUDA launch failed: ") + cudaGetErrorString(error));
  }

 private:
  torch::stable::accelerator::DeviceGuard guard_;
  cudaStream_t stream_;
};

inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

inline const float* floats(const Tensor& tensor) { return tensor.const_data_ptr<float>(); }

template <typename T>
const T* data_or_null(const std::optional<Tensor>& tensor) {
  return tensor ? tensor->const_data_ptr<T>() : nullptr;
}

// Of a padded [count, length] or packed [tokens] tensor.
inline Sequences sequences_of(const Tensor& tensor, const std::optional<Tensor>& cu_seqlens) {
  if (!cu_seqlens) return {nullptr, tensor.numel(), tensor.size(0), tensor.size(1)};
  return {cu_seqlens->const_data_ptr<int32_t>(), tensor.numel(), cu_seqlens->numel() - 1, 0};
}

inline Tensor empty_like(const Tensor& tensor, torch::headeronly::IntHeaderOnlyArrayRef sizes,
                         ScalarType dtype = ScalarType::Float) {
  return torch::stable::new_empty(tensor, sizes, dtype);
}

}  // namespace rlk
