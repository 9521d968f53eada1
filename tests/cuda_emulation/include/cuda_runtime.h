// The part of CUDA that kernels are written in, for g++: include this folder before any other and a .cuh or .cu file
// compiles as C++, one fiber per CUDA thread (see emulation.cpp). Stricter than a GPU wherever a GPU leaves the outcome
// undefined.
#pragma once

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <source_location>
#include <tuple>
#include <type_traits>
#include <utility>

#define __global__
#define __device__
#define __host__
#define __constant__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __align__(bytes) alignas(bytes)
// Blocks run one after another on one operating-system thread, so that one copy serves them all. Thread-local, because
// the ELF segment of thread-local data is then exactly the shared memory, and can be poisoned before each block.
#define __shared__ static thread_local

struct uint3 {
  unsigned x, y, z;
};

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

// The alignment is checked by UBSan at every access, as by the load and store instructions of a GPU.
#define EMULATION_VECTORS(name, type)                                 \
  struct alignas(8) [[gnu::may_alias]] name##2 { type x, y; };        \
  struct alignas(16) [[gnu::may_alias]] name##4 { type x, y, z, w; }; \
  inline name##2 make_##name##2(type x, type y) { return {x, y}; }    \
  inline name##4 make_##name##4(type x, type y, type z, type w) { return {x, y, z, w}; }
EMULATION_VECTORS(float, float)
EMULATION_VECTORS(int, int)
EMULATION_VECTORS(uint, unsigned)
#undef EMULATION_VECTORS

extern uint3 threadIdx, blockIdx;
extern dim3 blockDim, gridDim;
constexpr int warpSize = 32;
using std::isnan, std::max, std::min;

// ---- the runtime

enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorInvalidConfiguration = 9,
  cudaErrorLaunchFailure = 719
};
using cudaStream_t = struct CUstream_st*;
struct cudaLaunchAttribute;

struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
  cudaLaunchAttribute* attrs;
  unsigned numAttrs;
};

// What the kernel of a failed launch did wrong, and where.
const char* cudaGetErrorString(cudaError_t error);

namespace emulation {

// Runs `thread` once per CUDA thread.
cudaError_t launch(const cudaLaunchConfig_t& config, void (*thread)(void*), void* context);

using Where = std::source_location;

// All threads of the block arrive, at one place in the program.
void block_barrier(Where where);

// The lanes of `mask` arrive, at one place in the program, each with its bits; each gets those of all,
// until its next exchange.
struct Lanes {
  unsigned present;
  uint64_t bits[warpSize];
};
const Lanes& warp_exchange(unsigned mask, uint64_t bits, Where where);

unsigned lane_id();
[[noreturn]] void fail(const char* what, Where where);
void* dynamic_shared_memory();

template <typename T>
uint64_t to_bits(T value) {
  static_assert(sizeof(T) <= 8 && std::is_trivially_copyable_v<T>);
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof value);
  return bits;
}

template <typename T>
T from_bits(uint64_t bits) {
  T value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

template <typename T>
T shuffle(unsigned mask, T value, unsigned source, Where where) {
  const Lanes& lanes = warp_exchange(mask, to_bits(value), where);
  if (!(lanes.present >> source & 1)) fail("a shuffle reads a lane that does not take part in it", where);
  return from_bits<T>(lanes.bits[source]);
}

}  // namespace emulation

template <typename... Parameters, typename... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments&&... arguments) {
  std::tuple<Parameters...> values(std::forward<Arguments>(arguments)...);
  auto thread = [&] { std::apply(kernel, values); };
  return emulation::launch(*config, [](void* context) { (*static_cast<decltype(thread)*>(context))(); }, &thread);
}

// Stands for `extern __shared__ T name[];`, which is the one declaration that C++ has no reading for.
template <typename T>
T* dynamic_shared() {
  return static_cast<T*>(emulation::dynamic_shared_memory());
}

// ---- barriers, shuffles and votes

inline void __syncthreads(emulation::Where where = emulation::Where::current()) { emulation::block_barrier(where); }

inline void __syncwarp(unsigned mask = 0xffffffffu, emulation::Where where = emulation::Where::current()) {
  emulation::warp_exchange(mask, 0, where);
}

template <typename T>
T __shfl_sync(unsigned mask, T value, int source, int width = warpSize,
              emulation::Where where = emulation::Where::current()) {
  const unsigned segment = emulation::lane_id() & ~(width - 1u);
  return emulation::shuffle(mask, value, segment | (source & (width - 1u)), where);
}

template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int lane_mask, int width = warpSize,
                  emulation::Where where = emulation::Where::current()) {
  const unsigned lane = emulation::lane_id(), source = lane ^ lane_mask;
  return emulation::shuffle(mask, value, source < (lane & ~(width - 1u)) + width ? source : lane, where);
}

template <typename T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = warpSize,
                 emulation::Where where = emulation::Where::current()) {
  const unsigned lane = emulation::lane_id();
  return emulation::shuffle(mask, value, (lane & (width - 1u)) >= delta ? lane - delta : lane, where);
}

template <typename T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = warpSize,
                   emulation::Where where = emulation::Where::current()) {
  const unsigned lane = emulation::lane_id();
  return emulation::shuffle(mask, value, (lane & (width - 1u)) + delta < unsigned(width) ? lane + delta : lane, where);
}

// Bit i: lane i holds the value that this lane holds.
template <typename T>
unsigned __match_any_sync(unsigned mask, T value, emulation::Where where = emulation::Where::current()) {
  const emulation::Lanes& lanes = emulation::warp_exchange(mask, emulation::to_bits(value), where);
  unsigned same = 0;
  for (unsigned lane = 0; lane < warpSize; ++lane)
    if ((lanes.present >> lane & 1) && lanes.bits[lane] == emulation::to_bits(value)) same |= 1u << lane;
  return same;
}

inline unsigned __ballot_sync(unsigned mask, int predicate, emulation::Where where = emulation::Where::current()) {
  const emulation::Lanes& lanes = emulation::warp_exchange(mask, predicate != 0, where);
  unsigned votes = 0;
  for (unsigned lane = 0; lane < warpSize; ++lane)
    if (lanes.present >> lane & lanes.bits[lane] & 1) votes |= 1u << lane;
  return votes;
}

inline int __any_sync(unsigned mask, int predicate, emulation::Where where = emulation::Where::current()) {
  return __ballot_sync(mask, predicate, where) != 0;
}

inline int __all_sync(unsigned mask, int predicate, emulation::Where where = emulation::Where::current()) {
  return !__any_sync(mask, !predicate, where);
}

// ---- memory. Fibers change only at barriers, so that a plain read-modify-write is atomic.

template <typename T>
T __ldg(const T* address) {
  return *address;
}

template <typename T>
void __stcg(T* address, std::type_identity_t<T> value) {
  *address = value;
}

inline void __threadfence() {}
inline void __threadfence_block() {}

template <typename T>
T atomicExch(T* address, std::type_identity_t<T> value) {
  return std::exchange(*address, value);
}

template <typename T>
T atomicAdd(T* address, std::type_identity_t<T> value) {
  return std::exchange(*address, *address + value);
}

template <typename T>
T atomicMax(T* address, std::type_identity_t<T> value) {
  return std::exchange(*address, std::max(*address, value));
}

template <typename T>
T atomicMin(T* address, std::type_identity_t<T> value) {
  return std::exchange(*address, std::min(*address, value));
}

template <typename T>
T atomicCAS(T* address, std::type_identity_t<T> expected, std::type_identity_t<T> value) {
  const T old = *address;
  if (old == expected) *address = value;
  return old;
}

// ---- bits

inline int __float_as_int(float value) { return std::bit_cast<int>(value); }
inline float __int_as_float(int bits) { return std::bit_cast<float>(bits); }
inline int __popc(unsigned bits) { return std::popcount(bits); }
inline int __ffs(int bits) { return bits ? std::countr_zero(unsigned(bits)) + 1 : 0; }
inline int __clz(int bits) { return std::countl_zero(unsigned(bits)); }
