// Memory layouts, as torch defines them: strides of dimensions of size one do not matter.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/tensor.h>

#include <array>
#include <stdexcept>
#include <string>

#include "checks.h"

namespace fusedres {

// A dense 4-D tensor. Where both layouts fit (one channel, one pixel), it counts as channels_last.
struct Layout4d {
  int64_t batch, channels, height, width;
  bool channels_last;

  int64_t area() const { return height * width; }
  int64_t pixels() const { return batch * area(); }
  int64_t numel() const { return pixels() * channels; }

  std::array<int64_t, 4> strides() const {
    if (channels_last) return {area() * channels, 1, width * channels, channels};
    return {area() * channels, area(), width, 1};
  }
};

inline Layout4d layout_of(const Tensor& x) {
  STD_TORCH_CHECK(x.dim() == 4, "x must have 4 dimensions, but got ", x.dim());
  const auto sizes = x.sizes();
  const auto strides = x.strides();
  Layout4d layout{sizes[0], sizes[1], sizes[2], sizes[3], true};
  const auto fits = [&] {
    const auto wanted = layout.strides();
    for (int d = 0; d < 4; ++d) {
      if (sizes[d] != 1 && strides[d] != wanted[d]) return false;
    }
    return true;
  };
  if (fits()) return layout;
  layout.channels_last = false;
  STD_TORCH_CHECK(fits(), "x must be contiguous or channels_last");
  return layout;
}

inline Tensor empty_strided(
    const int64_t* sizes, const int64_t* strides, int64_t dim, ScalarType dtype, const Tensor& on_device_of) {
  int32_t device_type = 0, device_index = 0;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(on_device_of.get(), &device_type));
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(on_device_of.get(), &device_index));
  int32_t type = 0;
  switch (dtype) {
    case ScalarType::Float:
      type = aoti_torch_dtype_float32();
      break;
    case ScalarType::Double:
      type = aoti_torch_dtype_float64();
      break;
    case ScalarType::BFloat16:
      type = aoti_torch_dtype_bfloat16();
      break;
    case ScalarType::Half:
      type = aoti_torch_dtype_float16();
      break;
    default:
      STD_TORCH_CHECK(dtype == ScalarType::Byte, "unsupported dtype");
      type = aoti_torch_dtype_uint8();
  }
  AtenTensorHandle handle;
  if (aoti_torch_empty_strided(dim, sizes, strides, type, device_type, device_index, &handle) != AOTI_TORCH_SUCCESS) {
    int64_t elements = 1;
    for (int64_t d = 0; d < dim; ++d) elements *= sizes[d];
    // Only this class of exception crosses the stable ABI; fusedres/ops/registry.py looks for the first words.
    throw std::runtime_error("out of memory: cannot allocate a tensor of " + std::to_string(elements) + " elements");
  }
  return Tensor(handle);
}

inline Tensor uninitialized_like(const Tensor& x) {
  return empty_strided(x.sizes().data(), x.strides().data(), x.dim(), x.scalar_type(), x);
}

inline Tensor empty_vector(int64_t size, ScalarType dtype, const Tensor& on_device_of) {
  const int64_t one = 1;
  return empty_strided(&size, &one, 1, dtype, on_device_of);
}

}  // namespace fusedres
