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

inline void check_same_device(const char* name, const Tensor& t, const Tensor& x) {
  STD_TORCH_CHECK(t.device() == x.device(), name, " must be on the same device");
}

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

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// A launch of `blocks` blocks in one dimension; errors of the launch itself are raised here, those of the kernel later,
// as CUDA does.
template <typename... Parameters, typename... Arguments>
void launch(void (*kernel)(Parameters...), int64_t blocks, int threads, cudaStream_t stream, Arguments&&... arguments) {
  STD_TORCH_CHECK(
      blocks <= std::numeric_limits<int32_t>::max(), "tensor too large for one launch: ", blocks, " blocks");
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(blocks));
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.stream = stream;
  const cudaError_t error = cudaLaunchKernelEx(&config, kernel, std::forward<Arguments>(arguments)...);
  STD_TORCH_CHECK(error == cudaSuccess, "CUDA error: ", cudaGetErrorString(error));
}

}  // namespace fusedres
