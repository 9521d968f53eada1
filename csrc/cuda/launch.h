// Launches kernels, without torch. A launch function takes a Launcher, which <op>.cpp makes of the tensors' device.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <stdexcept>
#include <string>

namespace rlk {

class Launcher {
 public:
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

  // Memory for what one kernel leaves to the next. It lasts as long as the launcher.
  template <typename T>
  T* room_for(int64_t count) {
    return static_cast<T*>(room(count * static_cast<int64_t>(sizeof(T))));
  }

 protected:
  explicit Launcher(cudaStream_t stream) : stream_(stream) {}
  ~Launcher() = default;

 private:
  virtual void* room(int64_t bytes) = 0;

  cudaStream_t stream_;
};

inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace rlk
