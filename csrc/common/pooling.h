// Max-pooling windows, as max_pool2d defines them.
#pragma once

#include <cstdint>

namespace fusedres {

constexpr uint8_t kNoWinner = 255;  // the window's activation was cut: it sends no gradient

struct Pooling {
  int64_t batch, channels, height, width;  // input
  int64_t out_height, out_width;           // output
  int64_t kernel_h, kernel_w, stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w;
};

}  // namespace fusedres
