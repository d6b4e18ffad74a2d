// Kernels with the mistakes that the shim is there to find, one per run: `broken <name>` prints what came out of it.
#include <cuda_runtime.h>

#include <cstdio>
#include <cstring>
#include <memory>
#include <string_view>

#include "cuda/shared_memory.h"

namespace {

constexpr int kThreads = 64;
constexpr unsigned kWholeWarp = 0xffffffffu;

struct Arguments {
  const float* x;
  float* out;
};

__global__ void correct_kernel(Arguments a) {
  __shared__ float part[kThreads];
  part[threadIdx.x] = a.x[threadIdx.x];
  __syncthreads();
  a.out[threadIdx.x] = part[(threadIdx.x + 33) % kThreads];
}

__global__ void missing_barrier_kernel(Arguments a) {
  __shared__ float part[kThreads];
  part[threadIdx.x] = a.x[threadIdx.x];
  a.out[threadIdx.x] = part[(threadIdx.x + 33) % kThreads];
}

// The barrier between the writes and the reads is there; the one between the reads and the next writes is not.
__global__ void missing_second_barrier_kernel(Arguments a) {
  auto* part = fusedres::dynamic_shared_memory<float>();
  float sum = 0.0f;
  for (int round = 1; round <= 2; ++round) {
    part[threadIdx.x] = a.x[threadIdx.x] * round;
    __syncthreads();
    sum += part[kThreads - 1 - threadIdx.x];
  }
  a.out[threadIdx.x] = sum;
}

// Lanes of one warp do not run in step.
__global__ void missing_warp_barrier_kernel(Arguments a) {
  __shared__ float part[kThreads];
  part[threadIdx.x] = a.x[threadIdx.x];
  a.out[threadIdx.x] = part[threadIdx.x ^ 1];
}

__global__ void missing_fence_between_blocks_kernel(Arguments a) {
  const unsigned block = threadIdx.x;  // every block reads what other blocks write
  if (block == blockIdx.x) a.out[block] = a.x[block];
  if (threadIdx.x == 0 && blockIdx.x > 0) a.out[blockIdx.x] += a.out[blockIdx.x - 1];
}

__global__ void write_beyond_global_kernel(Arguments a) { a.out[threadIdx.x + 1] = a.x[threadIdx.x]; }

__global__ void read_beyond_global_kernel(Arguments a) { a.out[threadIdx.x] = a.x[threadIdx.x + 1]; }

__global__ void write_beyond_shared_kernel(Arguments a) {
  __shared__ float part[kThreads];
  float* behind = part + 1;
  behind[threadIdx.x] = a.x[threadIdx.x];
  __syncthreads();
  a.out[threadIdx.x] = part[threadIdx.x];
}

__global__ void write_beyond_dynamic_kernel(Arguments a) {
  auto* part = fusedres::dynamic_shared_memory<float>();
  part[threadIdx.x + 1] = a.x[threadIdx.x];
  __syncthreads();
  a.out[threadIdx.x] = part[threadIdx.x];
}

__global__ void misaligned_kernel(Arguments a) {
  if (threadIdx.x == 0) *reinterpret_cast<float4*>(a.out + 1) = *reinterpret_cast<const float4*>(a.x);
}

__global__ void barrier_after_end_kernel(Arguments a) {
  if (threadIdx.x >= 48) return;
  __syncthreads();
  a.out[threadIdx.x] = 1.0f;
}

__global__ void two_barriers_kernel(Arguments a) {
  if (threadIdx.x % 2) {
    __syncthreads();
  } else {
    __syncthreads();
  }
  a.out[threadIdx.x] = 1.0f;
}

__global__ void barrier_in_half_a_warp_kernel(Arguments a) {
  if (threadIdx.x % 32 < 16) __syncthreads();
  a.out[threadIdx.x] = __shfl_xor_sync(kWholeWarp, a.x[threadIdx.x], 1);
}

__global__ void shuffle_in_half_a_warp_kernel(Arguments a) {
  if (threadIdx.x % 32 < 16) a.out[threadIdx.x] = __shfl_xor_sync(kWholeWarp, a.x[threadIdx.x], 1);
  __syncthreads();
}

__global__ void shuffle_without_itself_kernel(Arguments a) {
  a.out[threadIdx.x] = __shfl_xor_sync(0x0000ffffu, a.x[threadIdx.x], 1);
}

__global__ void shuffle_from_outside_kernel(Arguments a) {
  if (threadIdx.x < 16) a.out[threadIdx.x] = __shfl_xor_sync(0x0000ffffu, a.x[threadIdx.x], 16);
}

struct Case {
  std::string_view name;
  void (*kernel)(Arguments);
  int blocks = 1;
};

constexpr Case kCases[] = {
    {"correct", correct_kernel},
    {"missing barrier", missing_barrier_kernel},
    {"missing second barrier", missing_second_barrier_kernel},
    {"missing warp barrier", missing_warp_barrier_kernel},
    {"order of blocks", missing_fence_between_blocks_kernel, kThreads},
    {"write beyond global", write_beyond_global_kernel},
    {"read beyond global", read_beyond_global_kernel},
    {"write beyond shared", write_beyond_shared_kernel},
    {"write beyond dynamic", write_beyond_dynamic_kernel},
    {"misaligned", misaligned_kernel},
    {"barrier after end", barrier_after_end_kernel},
    {"two barriers", two_barriers_kernel},
    {"barrier in half a warp", barrier_in_half_a_warp_kernel},
    {"shuffle in half a warp", shuffle_in_half_a_warp_kernel},
    {"shuffle without itself", shuffle_without_itself_kernel},
    {"shuffle from outside", shuffle_from_outside_kernel},
};

}  // namespace

int main(int, char** argv) {
  const std::unique_ptr<float[]> x(new float[kThreads]), out(new float[kThreads]);
  for (int i = 0; i < kThreads; ++i) x[i] = static_cast<float>(i + 1);
  std::memset(out.get(), 0xff, kThreads * sizeof(float));
  for (const Case& c : kCases) {
    if (c.name != argv[1]) continue;
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3(c.blocks);
    config.blockDim = dim3(kThreads);
    config.dynamicSmemBytes = kThreads * sizeof(float);
    const cudaError_t error = cudaLaunchKernelEx(&config, c.kernel, Arguments{x.get(), out.get()});
    if (error != cudaSuccess) {
      std::puts(cudaGetErrorString(error));
      return 3;
    }
    for (int i = 0; i < kThreads; ++i) std::printf("%g ", out[i]);
    std::puts("");
    return 0;
  }
  return 2;
}
