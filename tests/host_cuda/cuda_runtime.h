// The part of CUDA that csrc/cuda uses, on the host: a .cu file compiled as C++ with this folder first on the include
// path runs its kernels on the CPU, and registers its ops for CPU tensors under torch.ops.fusedres_host.
//
// Every CUDA thread of a block is a fiber. A fiber runs until it meets a warp-wide operation or ends; then the next one
// does. So a value that one lane offers in a shuffle is there when another asks for it in the following round.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <ucontext.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <memory>
#include <utility>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif

#define __global__
#define __device__
#define __launch_bounds__(...)

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
inline thread_local dim3 threadIdx, blockIdx;

using cudaStream_t = void*;
enum cudaError_t { cudaSuccess };
inline const char* cudaGetErrorString(cudaError_t) { return "no error"; }

struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
};

namespace host_cuda {

constexpr unsigned kWarpSize = 32;
constexpr size_t kStackBytes = 64 * 1024;

// One thread of a block: its stack, where it left off, and what it offers to the other lanes of its warp.
struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack{new char[kStackBytes]};
  void* asan_stack = nullptr;
  bool finished = false;
  unsigned exchanges = 0;
  unsigned offers[2];  // of the last two exchanges: a lane may be one ahead of the one that reads
};

// Runs one block at a time, its threads in turn.
class Block {
 public:
  static Block& current() {
    static thread_local Block block;
    return block;
  }

  void run(unsigned threads, const std::function<void()>& kernel) {
    kernel_ = &kernel;
    while (fibers_.size() < threads) fibers_.push_back(std::make_unique<Fiber>());
    for (unsigned t = 0; t < threads; ++t) start(*fibers_[t]);
    for (unsigned left = threads; left > 0;) {
      for (running_ = 0; running_ < threads; ++running_) {
        Fiber& fiber = *fibers_[running_];
        if (fiber.finished) continue;
        threadIdx = dim3(running_);
        enter(fiber);
        if (fiber.finished) --left;
      }
    }
  }

  // Offers a value and, once the other lanes have offered theirs, takes that of another lane.
  unsigned exchange(unsigned value, unsigned lane_mask) {
    Fiber& fiber = *fibers_[running_];
    const unsigned number = fiber.exchanges++;
    fiber.offers[number % 2] = value;
    leave(fiber);
    const Fiber& other = *fibers_[running_ ^ lane_mask];
    if (lane_mask >= kWarpSize || other.exchanges <= number) {
      std::fprintf(stderr, "shuffle with a lane that does not take part\n");
      std::abort();
    }
    return other.offers[number % 2];
  }

 private:
  void start(Fiber& fiber) {
    fiber.finished = false;
    fiber.exchanges = 0;
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.get();
    fiber.context.uc_stack.ss_size = kStackBytes;
    fiber.context.uc_link = &scheduler_;
    makecontext(&fiber.context, &Block::body, 0);
  }

  static void body() {
    Block& block = current();
    block.arrived(nullptr);
    (*block.kernel_)();
    Fiber& fiber = *block.fibers_[block.running_];
    fiber.finished = true;
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_start_switch_fiber(nullptr, block.scheduler_stack_, block.scheduler_stack_size_);
#endif
  }

  void enter(Fiber& fiber) {
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_start_switch_fiber(&scheduler_asan_stack_, fiber.stack.get(), kStackBytes);
#endif
    swapcontext(&scheduler_, &fiber.context);
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(scheduler_asan_stack_, nullptr, nullptr);
#endif
  }

  void leave(Fiber& fiber) {
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_start_switch_fiber(&fiber.asan_stack, scheduler_stack_, scheduler_stack_size_);
#endif
    swapcontext(&fiber.context, &scheduler_);
    arrived(fiber.asan_stack);
  }

  void arrived([[maybe_unused]] void* asan_stack) {
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(asan_stack, &scheduler_stack_, &scheduler_stack_size_);
#endif
  }

  std::vector<std::unique_ptr<Fiber>> fibers_;
  const std::function<void()>* kernel_ = nullptr;
  unsigned running_ = 0;
  ucontext_t scheduler_;
  [[maybe_unused]] void* scheduler_asan_stack_ = nullptr;
  [[maybe_unused]] const void* scheduler_stack_ = nullptr;
  [[maybe_unused]] size_t scheduler_stack_size_ = 0;
};

}  // namespace host_cuda

inline unsigned __shfl_xor_sync(unsigned, unsigned value, int lane_mask) {
  return host_cuda::Block::current().exchange(value, static_cast<unsigned>(lane_mask));
}

template <typename... Parameters, typename... Arguments>
cudaError_t cudaLaunchKernelEx(
    const cudaLaunchConfig_t* config, void (*kernel)(Parameters...), Arguments&&... arguments) {
  for (unsigned block = 0; block < config->gridDim.x; ++block) {
    blockIdx = dim3(block);
    host_cuda::Block::current().run(config->blockDim.x, [&] { kernel(arguments...); });
  }
  return cudaSuccess;
}

// What torch offers for CUDA only.
extern "C" {
AOTITorchError aoti_torch_get_current_cuda_stream(int32_t, void** stream) {
  *stream = nullptr;
  return AOTI_TORCH_SUCCESS;
}
AOTITorchError aoti_torch_create_device_guard(int32_t, DeviceGuardHandle* guard) {
  *guard = nullptr;
  return AOTI_TORCH_SUCCESS;
}
AOTITorchError aoti_torch_delete_device_guard(DeviceGuardHandle) { return AOTI_TORCH_SUCCESS; }
}

#undef STABLE_TORCH_LIBRARY_IMPL
#define STABLE_TORCH_LIBRARY_IMPL(ns, key, m) _STABLE_TORCH_LIBRARY_IMPL(fusedres_host, CPU, m, C10_UID)
