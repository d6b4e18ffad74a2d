// What every CUDA op needs on the host: device guard, current stream, dtype switch, grid size and a checked launch.
#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <cstdint>
#include <initializer_list>
#include <limits>
#include <utility>
#include <vector>

#include "common/checks.h"
#include "common/launch_plan.h"

namespace fusedres {

// Makes the device of a tensor current for as long as it lives, and knows the stream that torch uses there.
// Stream::nativeHandle() would be the stable API, but needs torch 2.13.
class DeviceScope {
 public:
  explicit DeviceScope(const Tensor& x) : guard_(x.get_device_index()) {
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(x.get_device_index(), &stream_));
  }
  cudaStream_t stream() const { return static_cast<cudaStream_t>(stream_); }

 private:
  torch::stable::accelerator::DeviceGuard guard_;
  void* stream_ = nullptr;
};

// Raises unless the tensor fills its memory without gaps or overlaps, whatever the order of its dimensions.
inline void check_dense(const char* name, const Tensor& x) {
  std::vector<std::pair<int64_t, int64_t>>
      dimensions;  // (stride, size), those of size 1 left out: their stride means nothing
  for (int64_t d = 0; d < x.dim(); ++d) {
    if (x.size(d) != 1) dimensions.emplace_back(x.stride(d), x.size(d));
  }
  std::sort(dimensions.begin(), dimensions.end());
  int64_t filled = 1;
  for (const auto& [stride, size] : dimensions) {
    STD_TORCH_CHECK(x.numel() == 0 || stride == filled, name, " must be dense in memory");
    filled *= size;
  }
}

// Calls f with a value of the C++ type of a floating dtype.
template <typename Function>
void dispatch_floating(ScalarType dtype, Function&& f) {
  switch (dtype) {
    case ScalarType::Float:
      return f(float{});
    case ScalarType::Double:
      return f(double{});
    case ScalarType::BFloat16:
      return f(c10::BFloat16{});
    case ScalarType::Half:
      return f(c10::Half{});
    default:
      STD_TORCH_CHECK(
          false, "expected float32, float64, bfloat16 or float16, but got ", torch::headeronly::toString(dtype));
  }
}

inline bool is_aligned(std::uintptr_t bytes, std::initializer_list<const void*> pointers) {
  for (const void* pointer : pointers) {
    if (reinterpret_cast<std::uintptr_t>(pointer) % bytes != 0) return false;
  }
  return true;
}

inline void check_cuda(cudaError_t error) {
  STD_TORCH_CHECK(error == cudaSuccess, "CUDA error: ", cudaGetErrorString(error));
}

// What the launch plans ask of the device that is current.
inline PlanDevice plan_device(const Tensor& x) {
  const auto attribute = [&](cudaDeviceAttr which) {
    int value = 0;
    check_cuda(cudaDeviceGetAttribute(&value, which, x.get_device_index()));
    return value;
  };
  return {
      attribute(cudaDevAttrMultiProcessorCount),
      attribute(cudaDevAttrL2CacheSize),
      attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin)};
}

constexpr int64_t kSharedBytesWithoutAsking = 48 * 1024;

// A launch of `blocks` blocks in one dimension, with `shared_bytes` of dynamic shared memory each; errors of the launch
// itself are raised here, those of the kernel later, as CUDA does.
template <typename... Parameters, typename... Arguments>
void launch_with_shared(
    void (*kernel)(Parameters...),
    int64_t blocks,
    int threads,
    int64_t shared_bytes,
    cudaStream_t stream,
    Arguments&&... arguments) {
  STD_TORCH_CHECK(
      blocks <= std::numeric_limits<int32_t>::max(), "tensor too large for one launch: ", blocks, " blocks");
  if (shared_bytes > kSharedBytesWithoutAsking) {
    check_cuda(
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_bytes)));
  }
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(blocks));
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.dynamicSmemBytes = static_cast<size_t>(shared_bytes);
  config.stream = stream;
  check_cuda(cudaLaunchKernelEx(&config, kernel, std::forward<Arguments>(arguments)...));
}

template <typename... Parameters, typename... Arguments>
void launch(void (*kernel)(Parameters...), int64_t blocks, int threads, cudaStream_t stream, Arguments&&... arguments) {
  launch_with_shared(kernel, blocks, threads, 0, stream, std::forward<Arguments>(arguments)...);
}

}  // namespace fusedres
