// The part of CUDA that csrc/cuda uses, on the host: a .cu file compiled as C++ with this folder first on the include
// path runs its kernels on the CPU. How threads take turns is in block.h.
//
// The device that it pretends to be is set by the environment, read at every call:
//   HOST_CUDA_SMS (132), HOST_CUDA_L2_BYTES (50 MiB), HOST_CUDA_BLOCKS_PER_SM (what threads and shared memory allow)
//   HOST_CUDA_ORDER (1): forward, reverse or a seed: in which order blocks, warps and lanes take turns
#pragma once

#include <algorithm>
#include <bit>
#include <climits>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>
#include <source_location>
#include <string>
#include <type_traits>
#include <utility>

#include "block.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __align__(n) alignas(n)
#define __grid_constant__
// Variables of the block: one block runs at a time. Each in a section of its own, for templates and others cannot
// share.
#define __shared__ static __attribute__((section("host_cuda_shared." HOST_CUDA_TEXT(__COUNTER__))))
#define HOST_CUDA_TEXT(x) HOST_CUDA_TEXT_OF(x)
#define HOST_CUDA_TEXT_OF(x) #x

// ---- the runtime ----

using cudaStream_t = struct CUstream_st*;

enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorInvalidConfiguration = 9,
  cudaErrorLaunchFailure = 719
};

enum cudaDeviceAttr {
  cudaDevAttrMaxThreadsPerBlock = 1,
  cudaDevAttrMaxSharedMemoryPerBlock = 8,
  cudaDevAttrWarpSize = 10,
  cudaDevAttrMaxRegistersPerBlock = 12,
  cudaDevAttrMultiProcessorCount = 16,
  cudaDevAttrL2CacheSize = 38,
  cudaDevAttrMaxThreadsPerMultiProcessor = 39,
  cudaDevAttrComputeCapabilityMajor = 75,
  cudaDevAttrComputeCapabilityMinor = 76,
  cudaDevAttrMaxSharedMemoryPerMultiprocessor = 81,
  cudaDevAttrMaxSharedMemoryPerBlockOptin = 97,
};

enum cudaFuncAttribute {
  cudaFuncAttributeMaxDynamicSharedMemorySize = 8,
  cudaFuncAttributePreferredSharedMemoryCarveout = 9
};

struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes = 0;
  cudaStream_t stream = nullptr;
};

namespace host_cuda {

constexpr int kMaxThreads = 1024, kMaxThreadsPerSm = 2048;
constexpr int kSharedBytes = 48 * 1024, kSharedBytesOptin = 227 * 1024, kSharedBytesPerSm = 228 * 1024;

struct State {
  std::mutex mutex;  // one launch at a time
  cudaError_t last_error = cudaSuccess;
  std::string why;                           // the last launch failed
  std::map<const void*, int> dynamic_bytes;  // that kernels may have, by cudaFuncSetAttribute
  static State& get() {
    static State state;
    return state;
  }
  cudaError_t fail(cudaError_t error, std::string text) {
    why = std::move(text);
    return last_error = error;
  }
};

inline int setting(const char* name, int otherwise) {
  const char* value = std::getenv(name);
  return value != nullptr ? std::atoi(value) : otherwise;
}

inline int max_dynamic_bytes(const void* kernel) {
  const auto& all = State::get().dynamic_bytes;
  const auto found = all.find(kernel);
  return found == all.end() ? kSharedBytes : found->second;
}

// What csrc/cuda/shared_memory.h returns.
inline void* dynamic_shared_memory() { return Block::current().dynamic_memory(); }

}  // namespace host_cuda

inline const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaSuccess ? "no error" : host_cuda::State::get().why.c_str();
}
inline cudaError_t cudaPeekAtLastError() { return host_cuda::State::get().last_error; }
inline cudaError_t cudaGetLastError() { return std::exchange(host_cuda::State::get().last_error, cudaSuccess); }

inline cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}

inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  using namespace host_cuda;
  const std::map<cudaDeviceAttr, int> values = {
      {cudaDevAttrMaxThreadsPerBlock, kMaxThreads},
      {cudaDevAttrMaxSharedMemoryPerBlock, kSharedBytes},
      {cudaDevAttrWarpSize, kWarpSize},
      {cudaDevAttrMaxRegistersPerBlock, 65536},
      {cudaDevAttrMultiProcessorCount, setting("HOST_CUDA_SMS", 132)},
      {cudaDevAttrL2CacheSize, setting("HOST_CUDA_L2_BYTES", 50 << 20)},
      {cudaDevAttrMaxThreadsPerMultiProcessor, kMaxThreadsPerSm},
      {cudaDevAttrComputeCapabilityMajor, 9},
      {cudaDevAttrComputeCapabilityMinor, 0},
      {cudaDevAttrMaxSharedMemoryPerMultiprocessor, kSharedBytesPerSm},
      {cudaDevAttrMaxSharedMemoryPerBlockOptin, kSharedBytesOptin},
  };
  *value = values.at(attribute);
  return cudaSuccess;
}

template <typename... Parameters>
cudaError_t cudaFuncSetAttribute(void (*kernel)(Parameters...), cudaFuncAttribute attribute, int value) {
  using namespace host_cuda;
  if (attribute != cudaFuncAttributeMaxDynamicSharedMemorySize) return cudaSuccess;
  if (value > kSharedBytesOptin) return State::get().fail(cudaErrorInvalidValue, "invalid argument");
  State::get().dynamic_bytes[reinterpret_cast<const void*>(kernel)] = std::max(value, kSharedBytes);
  return cudaSuccess;
}

template <typename... Parameters>
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(
    int* blocks, void (*)(Parameters...), int threads, size_t dynamic_bytes) {
  using namespace host_cuda;
  int fit = kMaxThreadsPerSm / threads;
  if (dynamic_bytes > 0) fit = std::min(fit, kSharedBytesPerSm / static_cast<int>(dynamic_bytes));
  *blocks = setting("HOST_CUDA_BLOCKS_PER_SM", fit);
  return cudaSuccess;
}

template <typename... Parameters, typename... Arguments>
cudaError_t cudaLaunchKernelEx(
    const cudaLaunchConfig_t* config, void (*kernel)(Parameters...), Arguments&&... arguments) {
  using namespace host_cuda;
  State& state = State::get();
  const std::lock_guard lock(state.mutex);
  const dim3 grid = config->gridDim, block = config->blockDim;
  const uint64_t threads = uint64_t{block.x} * block.y * block.z;
  if (threads < 1 || threads > kMaxThreads || block.z > 64 || grid.x < 1 || grid.x > INT_MAX || grid.y < 1 ||
      grid.y > 65535 || grid.z < 1 || grid.z > 65535) {
    return state.fail(cudaErrorInvalidConfiguration, "invalid configuration argument");
  }
  if (config->dynamicSmemBytes > static_cast<size_t>(max_dynamic_bytes(reinterpret_cast<const void*>(kernel)))) {
    return state.fail(cudaErrorInvalidValue, "more dynamic shared memory than cudaFuncSetAttribute allows");
  }
  try {
    Block::current().launch(grid, block, config->dynamicSmemBytes, [&] { kernel(arguments...); });
  } catch (const std::exception& error) {
    return state.fail(cudaErrorLaunchFailure, error.what());
  }
  return cudaSuccess;
}

inline cudaError_t cudaMemsetAsync(void* memory, int value, size_t bytes, cudaStream_t) {
  std::memset(memory, value, bytes);
  return cudaSuccess;
}

// ---- barriers and warps ----

using HostCudaWhere = std::source_location;

inline void __syncthreads(HostCudaWhere where = HostCudaWhere::current()) {
  host_cuda::Block::current().at_barrier({"__syncthreads", where.line()}, false);
}
inline int __syncthreads_count(int value, HostCudaWhere where = HostCudaWhere::current()) {
  return static_cast<int>(host_cuda::Block::current().at_barrier({"__syncthreads_count", where.line()}, value != 0));
}
inline int __syncthreads_or(int value, HostCudaWhere where = HostCudaWhere::current()) {
  return host_cuda::Block::current().at_barrier({"__syncthreads_or", where.line()}, value != 0) != 0;
}
inline int __syncthreads_and(int value, HostCudaWhere where = HostCudaWhere::current()) {
  return host_cuda::Block::current().at_barrier({"__syncthreads_and", where.line()}, value == 0) == 0;
}

inline void __syncwarp(unsigned mask = 0xffffffffu, HostCudaWhere where = HostCudaWhere::current()) {
  host_cuda::Block::current().in_warp({"__syncwarp", where.line()}, mask, 0, host_cuda::kBallot);
}
inline unsigned __ballot_sync(unsigned mask, int value, HostCudaWhere where = HostCudaWhere::current()) {
  const host_cuda::Place place = {"__ballot_sync", where.line()};
  return static_cast<unsigned>(host_cuda::Block::current().in_warp(place, mask, value != 0, host_cuda::kBallot));
}
inline int __any_sync(unsigned mask, int value, HostCudaWhere where = HostCudaWhere::current()) {
  return host_cuda::Block::current().in_warp({"__any_sync", where.line()}, mask, value != 0, host_cuda::kBallot) != 0;
}
inline int __all_sync(unsigned mask, int value, HostCudaWhere where = HostCudaWhere::current()) {
  return host_cuda::Block::current().in_warp({"__all_sync", where.line()}, mask, value == 0, host_cuda::kBallot) == 0;
}

namespace host_cuda {

template <typename T>
T shuffle(Place place, unsigned mask, T value, int source) {
  static_assert(std::is_arithmetic_v<T> && (sizeof(T) == 4 || sizeof(T) == 8));
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  bits = Block::current().in_warp(place, mask, bits, source);
  std::memcpy(&value, &bits, sizeof(T));
  return value;
}

inline int lane() { return static_cast<int>(Block::current().lane()); }

}  // namespace host_cuda

// Where the source lies outside the lane's part of `width` lanes, a lane gets its own value.
template <typename T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32, HostCudaWhere where = HostCudaWhere::current()) {
  const int first = host_cuda::lane() & ~(width - 1);
  return host_cuda::shuffle({"__shfl_sync", where.line()}, mask, value, first + (source & (width - 1)));
}
template <typename T>
T __shfl_up_sync(
    unsigned mask, T value, unsigned delta, int width = 32, HostCudaWhere where = HostCudaWhere::current()) {
  const int lane = host_cuda::lane(), source = lane - static_cast<int>(delta);
  const bool inside = source >= (lane & ~(width - 1));
  return host_cuda::shuffle({"__shfl_up_sync", where.line()}, mask, value, inside ? source : lane);
}
template <typename T>
T __shfl_down_sync(
    unsigned mask, T value, unsigned delta, int width = 32, HostCudaWhere where = HostCudaWhere::current()) {
  const int lane = host_cuda::lane(), source = lane + static_cast<int>(delta);
  const bool inside = source <= (lane | (width - 1));
  return host_cuda::shuffle({"__shfl_down_sync", where.line()}, mask, value, inside ? source : lane);
}
template <typename T>
T __shfl_xor_sync(
    unsigned mask, T value, int lane_mask, int width = 32, HostCudaWhere where = HostCudaWhere::current()) {
  const int lane = host_cuda::lane(), source = lane ^ lane_mask;
  const bool inside = source <= (lane | (width - 1));
  return host_cuda::shuffle({"__shfl_xor_sync", where.line()}, mask, value, inside ? source : lane);
}

inline void __threadfence() {}
inline void __threadfence_block() {}

// ---- memory ----

struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(16) double2 {
  double x, y;
};
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline double2 make_double2(double x, double y) { return {x, y}; }

// Hints to the caches; the values are those of a plain access.
template <typename T>
T __ldg(const T* from) {
  return *from;
}
template <typename T>
T __ldcg(const T* from) {
  return *from;
}
template <typename T>
T __ldcs(const T* from) {
  return *from;
}
template <typename T>
void __stcg(T* to, std::type_identity_t<T> value) {
  *to = value;
}
template <typename T>
void __stcs(T* to, std::type_identity_t<T> value) {
  *to = value;
}

// Integers only: sums of floats would depend on the order.
template <typename T>
T atomicAdd(T* address, std::type_identity_t<T> value) {
  static_assert(std::is_integral_v<T>);
  return std::exchange(*address, *address + value);
}
template <typename T>
T atomicMax(T* address, std::type_identity_t<T> value) {
  static_assert(std::is_integral_v<T>);
  return std::exchange(*address, std::max(*address, value));
}
template <typename T>
T atomicOr(T* address, std::type_identity_t<T> value) {
  static_assert(std::is_integral_v<T>);
  return std::exchange(*address, *address | value);
}
template <typename T>
T atomicExch(T* address, std::type_identity_t<T> value) {
  static_assert(std::is_integral_v<T>);
  return std::exchange(*address, value);
}
template <typename T>
T atomicCAS(T* address, std::type_identity_t<T> compare, std::type_identity_t<T> value) {
  static_assert(std::is_integral_v<T>);
  return std::exchange(*address, *address == compare ? value : *address);
}
inline unsigned atomicInc(unsigned* address, unsigned last) {
  return std::exchange(*address, *address >= last ? 0 : *address + 1);
}

// ---- arithmetic ----

template <typename A, typename B>
constexpr std::common_type_t<A, B> min(A a, B b) {
  static_assert(std::is_integral_v<A> && std::is_integral_v<B>, "fmin says what happens to NaN");
  return b < a ? b : a;
}
template <typename A, typename B>
constexpr std::common_type_t<A, B> max(A a, B b) {
  static_assert(std::is_integral_v<A> && std::is_integral_v<B>, "fmax says what happens to NaN");
  return a < b ? b : a;
}

inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __fsqrt_rn(float a) { return std::sqrt(a); }
inline float __frcp_rn(float a) { return 1.0f / a; }
inline double __fma_rn(double a, double b, double c) { return std::fma(a, b, c); }
inline double __dadd_rn(double a, double b) { return a + b; }
inline double __dsub_rn(double a, double b) { return a - b; }
inline double __dmul_rn(double a, double b) { return a * b; }
inline double __ddiv_rn(double a, double b) { return a / b; }
inline double __dsqrt_rn(double a) { return std::sqrt(a); }
inline float rsqrtf(float a) { return static_cast<float>(1.0 / std::sqrt(static_cast<double>(a))); }
inline double rsqrt(double a) { return 1.0 / std::sqrt(a); }

inline unsigned __float_as_uint(float a) { return std::bit_cast<unsigned>(a); }
inline int __float_as_int(float a) { return std::bit_cast<int>(a); }
inline float __uint_as_float(unsigned a) { return std::bit_cast<float>(a); }
inline float __int_as_float(int a) { return std::bit_cast<float>(a); }

inline int __popc(unsigned a) { return std::popcount(a); }
inline int __clz(int a) { return std::countl_zero(static_cast<unsigned>(a)); }
inline int __ffs(int a) { return __builtin_ffs(a); }
inline unsigned __umulhi(unsigned a, unsigned b) { return static_cast<unsigned>(uint64_t{a} * b >> 32); }
