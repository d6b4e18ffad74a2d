// The arguments of a max pooling: their checks, and the shapes that follow from them.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <vector>

#include "checks.h"
#include "layout.h"
#include "pooling.h"

namespace fusedres {

using Ints = std::vector<int64_t>;

inline int64_t pooled_size(
    int64_t size, int64_t kernel, int64_t stride, int64_t pad, int64_t dilation, bool ceil_mode) {
  const int64_t span = size + 2 * pad - dilation * (kernel - 1) - 1;
  STD_TORCH_CHECK(span >= 0 || ceil_mode, "x is too small for kernel_size");
  int64_t steps = ceil_mode ? (span + stride - 1) / stride : span / stride;
  // The last window must start inside the input or its left padding.
  if (ceil_mode && steps * stride >= size + pad) --steps;
  STD_TORCH_CHECK(steps >= 0, "x is too small for kernel_size");
  return steps + 1;
}

inline Pooling pooling_of(
    const Layout4d& layout,
    const Ints& kernel,
    const Ints& stride,
    const Ints& pad,
    const Ints& dilation,
    bool ceil_mode) {
  for (const Ints* pair : {&kernel, &stride, &pad, &dilation})
    STD_TORCH_CHECK(pair->size() == 2, "windows have two sizes");
  for (int d = 0; d < 2; ++d) {
    STD_TORCH_CHECK(
        kernel[d] > 0 && stride[d] > 0 && dilation[d] > 0, "kernel_size, stride and dilation must be positive");
    STD_TORCH_CHECK(
        pad[d] >= 0 && pad[d] <= ((kernel[d] - 1) * dilation[d] + 1) / 2, "padding must be at most half of the window");
  }
  STD_TORCH_CHECK(
      kernel[0] <= kNoWinner && kernel[1] <= kNoWinner && kernel[0] * kernel[1] <= kNoWinner,
      "windows of more than 255 elements are not supported");
  STD_TORCH_CHECK(
      layout.height >= dilation[0] && layout.width >= dilation[1], "windows may not lie in the padding altogether");
  Pooling p{
      layout.batch,
      layout.channels,
      layout.height,
      layout.width,
      0,
      0,
      kernel[0],
      kernel[1],
      stride[0],
      stride[1],
      pad[0],
      pad[1],
      dilation[0],
      dilation[1]};
  p.out_height = pooled_size(p.height, p.kernel_h, p.stride_h, p.pad_h, p.dilation_h, ceil_mode);
  p.out_width = pooled_size(p.width, p.kernel_w, p.stride_w, p.pad_w, p.dilation_w, ceil_mode);
  // With one output the stride does not matter, and may be huge.
  if (p.out_height == 1) p.stride_h = 1;
  if (p.out_width == 1) p.stride_w = 1;
  return p;
}

inline Layout4d pooled_layout(const Layout4d& layout, const Pooling& p) {
  return {layout.batch, layout.channels, p.out_height, p.out_width, layout.channels_last};
}

inline Tensor empty_pooled(const Layout4d& pooled, const Tensor& x) {
  const int64_t sizes[] = {pooled.batch, pooled.channels, pooled.height, pooled.width};
  return empty_strided(sizes, pooled.strides().data(), 4, x.scalar_type(), x);
}

// Raises unless dy is laid out as the output.
inline void check_pooled(const char* name, const Tensor& t, const Layout4d& pooled, const Tensor& x) {
  const auto strides = pooled.strides();
  const int64_t sizes[] = {pooled.batch, pooled.channels, pooled.height, pooled.width};
  bool same = t.dim() == 4 && t.scalar_type() == x.scalar_type();
  for (int d = 0; same && d < 4; ++d) same = t.size(d) == sizes[d] && (sizes[d] == 1 || t.stride(d) == strides[d]);
  STD_TORCH_CHECK(same, name, " must have the shape and strides of the output, and the dtype of x");
  check_same_device(name, t, x);
}

}  // namespace fusedres
