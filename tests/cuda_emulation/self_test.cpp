// Small kernels, each named on the command line, which check the emulation from inside. tests/test_cuda_emulation.py
// runs them; those that do wrong on purpose must be found out.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdio>
#include <cstdlib>
#include <map>
#include <string>
#include <vector>

namespace {

template <typename... Parameters, typename... Arguments>
void run(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes, Arguments... arguments) {
  const cudaLaunchConfig_t config{grid, block, shared_bytes, nullptr, nullptr, 0};
  const cudaError_t error = cudaLaunchKernelEx(&config, kernel, arguments...);
  if (error == cudaSuccess) return;
  std::printf("error: %s\n", cudaGetErrorString(error));
  std::exit(3);
}

void expect(bool right, emulation::Where where = emulation::Where::current()) {
  if (right) return;
  std::printf("line %u: not what was expected\n", where.line());
  std::exit(1);
}

template <typename T>
void print(const std::vector<T>& values) {
  for (T value : values) std::printf("%g ", double(value));
  std::printf("\n");
}

// ---- what works

__global__ void index_kernel(unsigned* out) {
  const unsigned block = blockIdx.x + gridDim.x * (blockIdx.y + gridDim.y * blockIdx.z);
  const unsigned thread = threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z);
  out[block * blockDim.x * blockDim.y * blockDim.z + thread] += block * 1000 + thread;
}

void indices() {
  std::vector<unsigned> out(2 * 3 * 4 * 5 * 7 * 2);
  run(index_kernel, dim3(2, 3, 4), dim3(5, 7, 2), 0, out.data());
  for (unsigned i = 0; i < out.size(); ++i) expect(out[i] == i / 70 * 1000 + i % 70);
}

// A template, whose shared variables the compiler places differently.
template <typename T, bool kBarrier>
__global__ void reverse_kernel(T* values) {
  __shared__ T tile[256];
  tile[threadIdx.x] = values[threadIdx.x];
  if (kBarrier) __syncthreads();
  values[threadIdx.x] = tile[blockDim.x - 1 - threadIdx.x];
}

void block_barrier() {
  std::vector<float> values(256);
  for (int i = 0; i < 256; ++i) values[i] = i;
  run(reverse_kernel<float, true>, 1, 256, 0, values.data());
  for (int i = 0; i < 256; ++i) expect(values[i] == 255 - i);
}

__global__ void rotate_kernel(double* values) {
  double* tile = dynamic_shared<double>();
  const int lane = threadIdx.x % 32, base = threadIdx.x - lane;
  tile[threadIdx.x] = values[threadIdx.x];
  __syncwarp();
  values[threadIdx.x] = tile[base + (lane + 1) % 32];
}

void warp_barrier() {
  std::vector<double> values(96);
  for (int i = 0; i < 96; ++i) values[i] = i;
  run(rotate_kernel, 1, 96, 96 * sizeof(double), values.data());
  for (int i = 0; i < 96; ++i) expect(values[i] == i / 32 * 32 + (i + 1) % 32);
}

template <typename T>
__global__ void shuffle_kernel(T* out) {
  const int lane = threadIdx.x;
  const T value = T(lane * lane);
  out[lane] = __shfl_sync(~0u, value, 5);
  out[32 + lane] = __shfl_sync(~0u, value, lane + 1, 8);
  out[64 + lane] = __shfl_xor_sync(~0u, value, 9);
  out[96 + lane] = __shfl_up_sync(~0u, value, 3, 16);
  out[128 + lane] = __shfl_down_sync(~0u, value, 3);
  if (lane < 8) out[160 + lane] = __shfl_xor_sync(0xffu, value, 7);
  if (lane >= 8) out[160 + lane] = __shfl_sync(0xffffff00u, value, 8);
}

template <typename T>
void check_shuffles() {
  std::vector<T> out(192);
  run(shuffle_kernel<T>, 1, 32, 0, out.data());
  for (int i = 0; i < 32; ++i) {
    auto square = [](int lane) { return T(lane * lane); };
    expect(out[i] == square(5));
    expect(out[32 + i] == square(i / 8 * 8 + (i + 1) % 8));
    expect(out[64 + i] == square(i ^ 9));
    expect(out[96 + i] == square(i % 16 < 3 ? i : i - 3));
    expect(out[128 + i] == square(i + 3 < 32 ? i + 3 : i));
    expect(out[160 + i] == square(i < 8 ? i ^ 7 : 8));
  }
}

void shuffles() {
  check_shuffles<float>();
  check_shuffles<int>();
  check_shuffles<double>();
  check_shuffles<uint64_t>();
}

__global__ void vote_kernel(unsigned* out) {
  const int lane = threadIdx.x;
  out[lane] = __ballot_sync(~0u, lane % 3 == 0);
  out[32 + lane] = __any_sync(~0u, lane == 31) + 2 * __any_sync(~0u, lane == 32);
  out[64 + lane] = __all_sync(~0u, lane < 32) + 2 * __all_sync(~0u, lane < 31);
  out[96 + lane] = __match_any_sync(~0u, lane % 4);
}

void votes() {
  std::vector<unsigned> out(128);
  run(vote_kernel, 1, 32, 0, out.data());
  for (int i = 0; i < 32; ++i) {
    expect(out[i] == 0x49249249u);
    expect(out[32 + i] == 1 && out[64 + i] == 1);
    expect(out[96 + i] == 0x11111111u << i % 4);
  }
}

// The last warp has 8 lanes.
__global__ void partial_warp_kernel(unsigned* out) { out[threadIdx.x] = __ballot_sync(~0u, 1); }

void partial_warp() {
  std::vector<unsigned> out(40);
  run(partial_warp_kernel, 1, 40, 0, out.data());
  expect(out[0] == ~0u && out[39] == 0xffu);
}

__global__ void atomic_kernel(int* sum, unsigned* largest, float* total, unsigned long long* ticket, int* lock) {
  atomicAdd(sum, int(threadIdx.x));
  atomicMax(largest, threadIdx.x + blockIdx.x);
  atomicMin(sum + 1, -int(threadIdx.x));
  atomicAdd(total, 0.5f);
  atomicAdd(ticket, 1);
  if (atomicCAS(lock, 0, 1) == 0) atomicExch(sum + 2, 7);
}

void atomics() {
  std::vector<int> sum(3);
  unsigned largest = 0;
  float total = 0;
  unsigned long long ticket = 0;
  int lock = 0;
  run(atomic_kernel, 3, 100, 0, sum.data(), &largest, &total, &ticket, &lock);
  expect(sum[0] == 3 * 4950 && sum[1] == -99 && sum[2] == 7);
  expect(largest == 101 && total == 150 && ticket == 300 && lock == 1);
}

__global__ void copy_kernel(const float* from, float* to) {
  reinterpret_cast<float4*>(to)[threadIdx.x] = reinterpret_cast<const float4*>(from)[threadIdx.x];
}

void vector_loads() {
  alignas(16) float from[132], to[132];
  for (int i = 0; i < 132; ++i) from[i] = i;
  run(copy_kernel, 1, 32, 0, from, to);
  expect(std::equal(from, from + 128, to));
}

// Every float16 and bfloat16 widened, and every float32 of standard input rounded, for the test to compare with torch.
void conversions() {
  for (unsigned bits = 0; bits < 65536; ++bits) {
    const float widened[] = {__bfloat162float({uint16_t(bits)}), __half2float({uint16_t(bits)})};
    std::fwrite(widened, sizeof widened, 1, stdout);
  }
  float value;
  while (std::fread(&value, sizeof value, 1, stdin) == 1) {
    const uint16_t rounded[] = {__float2bfloat16_rn(value).bits, __float2half_rn(value).bits};
    std::fwrite(rounded, sizeof rounded, 1, stdout);
  }
}

__global__ void unwritten_kernel(float* out) {
  __shared__ float tile[4];
  const float* dynamic = dynamic_shared<float>();
  out[threadIdx.x] = tile[threadIdx.x] + dynamic[0];
  tile[threadIdx.x] = 1;
}

void unwritten_shared() {
  std::vector<float> out(4);
  for (int launch = 0; launch < 2; ++launch) {
    run(unwritten_kernel, 2, 4, 16, out.data());
    for (float value : out) expect(value != value);
  }
}

// ---- what must be found out

void missing_barrier() {
  std::vector<float> values(256);
  for (int i = 0; i < 256; ++i) values[i] = i;
  run(reverse_kernel<float, false>, 1, 256, 0, values.data());
  print(values);
}

// A reduction whose second round overwrites the first before every warp has read it.
__global__ void reused_tile_kernel(float* out) {
  __shared__ float tile[4];
  const int warp = threadIdx.x / 32;
  for (int round = 0; round < 2; ++round) {
    if (threadIdx.x % 32 == 0) tile[warp] = float(round * 100 + warp);
    __syncthreads();
    out[round * 128 + threadIdx.x] = tile[0] + tile[3];
  }
}

void missing_second_barrier() {
  std::vector<float> out(256);
  run(reused_tile_kernel, 1, 128, 0, out.data());
  print(out);
}

__global__ void missing_warp_barrier_kernel(float* values) {
  __shared__ float tile[32];
  tile[threadIdx.x] = values[threadIdx.x];
  values[threadIdx.x] = tile[31 - threadIdx.x];
}

void missing_warp_barrier() {
  std::vector<float> values(32, 1.0f);
  run(missing_warp_barrier_kernel, 1, 32, 0, values.data());
  print(values);
}

__global__ void last_element_kernel(const float* values, int count, float* out) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i <= count) out[0] = values[i];
}

void out_of_bounds() {
  std::vector<float> values(100), out(1);
  run(last_element_kernel, 4, 32, 0, values.data(), 100, out.data());
}

__global__ void shared_index_kernel(int index, float* out) {
  __shared__ float tile[32];
  tile[index] = 1;
  out[0] = tile[0];
}

void shared_out_of_bounds() {
  float out;
  run(shared_index_kernel, 1, 1, 0, 32, &out);
}

__global__ void dynamic_index_kernel(int index) { dynamic_shared<float>()[index] = 1; }

void dynamic_out_of_bounds() { run(dynamic_index_kernel, 1, 1, 32 * sizeof(float), 32); }

__global__ void early_exit_kernel() {
  if (threadIdx.x == 5) return;
  __syncthreads();
}

void divergent_barrier() { run(early_exit_kernel, 1, 64, 0); }

__global__ void two_barriers_kernel() {
  if (threadIdx.x < 32)
    __syncthreads();
  else
    __syncthreads();
}

void two_barriers() { run(two_barriers_kernel, 1, 64, 0); }

__global__ void half_warp_kernel(int* out) {
  if (threadIdx.x < 16) out[threadIdx.x] = __shfl_sync(~0u, 1, 0);
}

void divergent_shuffle() {
  std::vector<int> out(32);
  run(half_warp_kernel, 1, 32, 0, out.data());
}

__global__ void absent_lane_kernel(int* out) {
  if (threadIdx.x < 16) out[threadIdx.x] = __shfl_sync(0xffffu, 1, 20);
}

void absent_lane() {
  std::vector<int> out(32);
  run(absent_lane_kernel, 1, 32, 0, out.data());
}

void misaligned_vector() {
  alignas(16) float from[136], to[128];
  run(copy_kernel, 1, 32, 0, from + 1, to);
}

void too_many_threads() { run(half_warp_kernel, 1, 1025, 0, nullptr); }

void empty_grid() { run(half_warp_kernel, 0, 32, 0, nullptr); }

// A failed launch leaves the next one unharmed.
void after_an_error() {
  const cudaLaunchConfig_t config{1, 64, 0, nullptr, nullptr, 0};
  for (int i = 0; i < 3; ++i) {
    expect(cudaLaunchKernelEx(&config, early_exit_kernel) == cudaErrorLaunchFailure);
    block_barrier();
  }
}

const std::map<std::string, void (*)()> kCases = {
#define CASE(name) {#name, name}
    CASE(indices),
    CASE(block_barrier),
    CASE(warp_barrier),
    CASE(shuffles),
    CASE(votes),
    CASE(partial_warp),
    CASE(atomics),
    CASE(vector_loads),
    CASE(conversions),
    CASE(unwritten_shared),
    CASE(after_an_error),
    CASE(missing_barrier),
    CASE(missing_second_barrier),
    CASE(missing_warp_barrier),
    CASE(out_of_bounds),
    CASE(shared_out_of_bounds),
    CASE(dynamic_out_of_bounds),
    CASE(divergent_barrier),
    CASE(two_barriers),
    CASE(divergent_shuffle),
    CASE(absent_lane),
    CASE(misaligned_vector),
    CASE(too_many_threads),
    CASE(empty_grid),
#undef CASE
};

}  // namespace

int main(int, char** arguments) { kCases.at(arguments[1])(); }
