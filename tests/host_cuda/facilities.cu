// Small kernels, one for each thing that the shim offers. They are CUDA: nvcc compiles this file as well.
#include <cuda_runtime.h>

#include <cstdint>

#include "cuda/shared_memory.h"

#define EXPORT extern "C" __attribute__((visibility("default")))

namespace {

constexpr unsigned kWholeWarp = 0xffffffffu;

template <typename... Parameters, typename... Arguments>
const char* launch(dim3 grid, dim3 block, size_t bytes, void (*kernel)(Parameters...), Arguments... arguments) {
  cudaLaunchConfig_t config = {};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = bytes;
  const cudaError_t error = cudaLaunchKernelEx(&config, kernel, arguments...);
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

__global__ void where_kernel(int* out) {
  const unsigned block = blockIdx.x + gridDim.x * (blockIdx.y + gridDim.y * blockIdx.z);
  const unsigned thread = threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z);
  const unsigned threads = blockDim.x * blockDim.y * blockDim.z;
  out[block * threads + thread] =
      blockIdx.z * 100000 + blockIdx.y * 10000 + blockIdx.x * 1000 + threadIdx.z * 100 + threadIdx.y * 10 + threadIdx.x;
}

// The sum of each block's values, by a tree in shared memory.
template <typename T, int kThreads>
__global__ void __launch_bounds__(kThreads) static_sum_kernel(const T* __restrict__ x, T* __restrict__ out) {
  __shared__ T part[kThreads];
  part[threadIdx.x] = __ldg(x + blockIdx.x * kThreads + threadIdx.x);
  for (int half = kThreads / 2; half > 0; half /= 2) {
    __syncthreads();
    if (threadIdx.x < half) part[threadIdx.x] += part[threadIdx.x + half];
  }
  if (threadIdx.x == 0) out[blockIdx.x] = part[0];
}

// The same by shuffles, with one value per warp in dynamic shared memory.
__global__ void dynamic_sum_kernel(const float* __restrict__ x, float* __restrict__ out) {
  auto* part = fusedres::dynamic_shared_memory<float>();
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  float sum = x[blockIdx.x * blockDim.x + threadIdx.x];
  for (int d = 16; d > 0; d /= 2) sum += __shfl_down_sync(kWholeWarp, sum, d);
  if (lane == 0) part[warp] = sum;
  __syncthreads();
  if (warp == 0) {
    sum = lane < blockDim.x / 32 ? part[lane] : 0.0f;
    for (int d = 16; d > 0; d /= 2) sum += __shfl_xor_sync(kWholeWarp, sum, d);
    if (lane == 0) out[blockIdx.x] = sum;
  }
}

template <typename T>
__global__ void shuffles_kernel(const T* x, T* out, int amount, int width) {
  const int t = threadIdx.x, n = blockDim.x;
  out[t] = __shfl_sync(kWholeWarp, x[t], amount, width);
  out[n + t] = __shfl_up_sync(kWholeWarp, x[t], amount, width);
  out[2 * n + t] = __shfl_down_sync(kWholeWarp, x[t], amount, width);
  out[3 * n + t] = __shfl_xor_sync(kWholeWarp, x[t], amount, width);
}

// Two halves of a warp that exchange at their own pace, then all of it; the last warp of the block may be a partial
// one.
__global__ void halves_kernel(int* out) {
  const int lane = threadIdx.x % 32, half = lane / 16;
  const unsigned mask = half ? 0xffff0000u : 0x0000ffffu;
  int value = threadIdx.x;
  for (int d = 1; d < (half ? 16 : 4); d *= 2) value += __shfl_xor_sync(mask, value, d);
  __syncwarp();
  out[threadIdx.x] = __shfl_xor_sync(kWholeWarp, value, 1) + value;
}

__global__ void votes_kernel(const int* x, unsigned* out) {
  const int t = threadIdx.x, n = blockDim.x;
  out[t] = __ballot_sync(kWholeWarp, x[t]);
  out[n + t] = __any_sync(kWholeWarp, x[t]);
  out[2 * n + t] = __all_sync(kWholeWarp, x[t]);
  out[3 * n + t] = __syncthreads_count(x[t]);
  out[4 * n + t] = __syncthreads_or(x[t]);
  out[5 * n + t] = __syncthreads_and(x[t]);
}

// The block that comes last adds what all blocks left, in their order.
__global__ void last_block_kernel(const float* x, float* partial, unsigned* tickets, float* out) {
  __shared__ bool is_last;
  partial[blockIdx.x] = x[blockIdx.x] * 2;
  __threadfence();
  if (threadIdx.x == 0) is_last = atomicAdd(tickets, 1u) == gridDim.x - 1;
  __syncthreads();
  if (is_last && threadIdx.x == 0) {
    float sum = 0.0f;
    for (unsigned b = 0; b < gridDim.x; ++b) sum += partial[b];
    *out = sum;
  }
}

// What shared memory holds before anything is written to it; the blocks leave something else behind.
__global__ void unwritten_kernel(float* out) {
  __shared__ float fixed[2];
  auto* dynamic = fusedres::dynamic_shared_memory<float>();
  out[2 * blockIdx.x] = fixed[1];
  out[2 * blockIdx.x + 1] = dynamic[1];
  fixed[1] = dynamic[1] = 1.0f;
}

__global__ void arithmetic_kernel(const float* x, float* out) {
  const float a = x[0], b = x[1], c = x[2];
  out[0] = __fmaf_rn(a, b, c);
  out[1] = static_cast<float>(__fma_rn(a, b, c));
  out[2] = rsqrtf(a);
  out[3] = static_cast<float>(min(3, 5) + max(7u, 2u) + __popc(0xf0) + __ffs(8) + __clz(1));
  out[4] = __uint_as_float(__float_as_uint(a) ^ 0x80000000u);
  out[5] = static_cast<float>(__umulhi(0x80000000u, 6));
  const float4 v = make_float4(a, b, c, 0.0f);
  out[6] = __fadd_rn(v.x, v.y) - __fmul_rn(v.z, v.z);
}

}  // namespace

EXPORT const char* where(int* out) { return launch(dim3(2, 3, 2), dim3(4, 2, 3), 0, where_kernel, out); }
EXPORT const char* static_sum_float(const float* x, float* out, int blocks) {
  return launch(blocks, 64, 0, static_sum_kernel<float, 64>, x, out);
}
EXPORT const char* static_sum_double(const double* x, double* out, int blocks) {
  return launch(blocks, 256, 0, static_sum_kernel<double, 256>, x, out);
}
EXPORT const char* dynamic_sum(const float* x, float* out, int blocks, int threads) {
  return launch(blocks, threads, threads / 32 * sizeof(float), dynamic_sum_kernel, x, out);
}
EXPORT const char* shuffles_float(const float* x, float* out, int amount, int width) {
  return launch(1, 64, 0, shuffles_kernel<float>, x, out, amount, width);
}
EXPORT const char* shuffles_double(const double* x, double* out, int amount, int width) {
  return launch(1, 64, 0, shuffles_kernel<double>, x, out, amount, width);
}
EXPORT const char* shuffles_int(const int* x, int* out, int amount, int width) {
  return launch(1, 64, 0, shuffles_kernel<int>, x, out, amount, width);
}
EXPORT const char* shuffles_long(const long long* x, long long* out, int amount, int width) {
  return launch(1, 64, 0, shuffles_kernel<long long>, x, out, amount, width);
}
EXPORT const char* halves(int* out, int threads) { return launch(1, threads, 0, halves_kernel, out); }
EXPORT const char* votes(const int* x, unsigned* out, int threads) {
  return launch(1, threads, 0, votes_kernel, x, out);
}
EXPORT const char* last_block(const float* x, float* partial, unsigned* tickets, float* out, int blocks) {
  cudaMemsetAsync(tickets, 0, sizeof(unsigned), nullptr);
  return launch(blocks, 32, 0, last_block_kernel, x, partial, tickets, out);
}
EXPORT const char* unwritten(float* out, int blocks) {
  return launch(blocks, 1, 2 * sizeof(float), unwritten_kernel, out);
}
EXPORT const char* arithmetic(const float* x, float* out) { return launch(1, 1, 0, arithmetic_kernel, x, out); }

EXPORT const char* too_much_memory(float* out, int bytes, bool allow) {
  if (allow) cudaFuncSetAttribute(unwritten_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  return launch(1, 1, bytes, unwritten_kernel, out);
}
EXPORT const char* too_many_threads(int* out) { return launch(1, 1025, 0, where_kernel, out); }

EXPORT const char* device(int* values) {
  int current = -1;
  cudaGetDevice(&current);
  cudaDeviceGetAttribute(values, cudaDevAttrMultiProcessorCount, current);
  cudaDeviceGetAttribute(values + 1, cudaDevAttrL2CacheSize, current);
  cudaDeviceGetAttribute(values + 2, cudaDevAttrMaxSharedMemoryPerBlockOptin, current);
  cudaOccupancyMaxActiveBlocksPerMultiprocessor(values + 3, static_sum_kernel<float, 64>, 64, 0);
  return nullptr;
}
EXPORT const char* last_error(int* value) {
  *value = static_cast<int>(cudaGetLastError());
  return nullptr;
}
