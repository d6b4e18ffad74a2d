// The CPU kernels of batch_norm_act_max_pool over part of a tensor.
#pragma once

#include "batch_norm_kernels.h"
#include "common/pooling.h"

namespace fusedres::cpu {

// Windows, and the rows that the kernels keep of them.
struct Pooling : fusedres::Pooling {
  int64_t span_h() const { return (kernel_h - 1) * dilation_h + 1; }

  // The plane kernels keep a row split by column modulo stride, so that the columns that one tap of the windows reads
  // are consecutive. Each part has room for the taps that fall into the padding, on the left and on the right.
  int64_t part_margin() const { return (pad_w + stride_w - 1) / stride_w; }
  int64_t part_length() const {
    const int64_t read = out_width + kLanes + (kernel_w - 1) * dilation_w / stride_w + 1;
    const int64_t written = (width + stride_w - 1) / stride_w;
    return (part_margin() + (read > written ? read : written) + kLanes - 1) / kLanes * kLanes;
  }
  int64_t row_length() const { return stride_w * part_length(); }
  // Where tap kw of output column 0 lies in a row.
  int64_t tap_offset(int64_t kw) const {
    const int64_t column = kw * dilation_w - pad_w;
    const int64_t index = column >= 0 ? column / stride_w : -((-column + stride_w - 1) / stride_w);
    return (column - index * stride_w) * part_length() + part_margin() + index;
  }
};

template <class T>
struct PoolArgs {
  using S = typename ScalarOf<T>::type;
  const S* params;  // the backward's table, in the forward too
  const T* x;
  bool relu;
  T* out;
  const T* dy;
  uint8_t* winners;  // position in the window, of every output element, in the layout of the output
  T* dx;
  bool uses_x;  // false in evaluation, where dx = g * scale whatever x is
  bool stream;
};

// Rows are output rows (input rows for `backward_rows`), counted through the batch; planes are counted through batch
// and channels. `scratch` holds `scratch_scalars` values of the compute type. Arguments go by value: see traverse.h.
template <class T>
struct MaxPoolKernels {
  using S = typename ScalarOf<T>::type;
  void (*forward_rows)(PoolArgs<T>, Pooling, int64_t begin, int64_t end, S* scratch);
  void (*forward_planes)(PoolArgs<T>, Pooling, int64_t begin, int64_t end, S* scratch);
  // Finds the winners and adds sum g and sum g*(x - mean), per channel.
  void (*winners_rows)(PoolArgs<T>, Pooling, int64_t begin, int64_t end, S* scratch, double* sum_g, double* sum_gx);
  void (*winners_planes)(PoolArgs<T>, Pooling, int64_t begin, int64_t end, S* scratch, double* sum_g, double* sum_gx);
  void (*backward_rows)(PoolArgs<T>, Pooling, int64_t begin, int64_t end);
  void (*backward_planes)(PoolArgs<T>, Pooling, int64_t begin, int64_t end, S* scratch);
};

// Enough for any of the kernels above.
inline int64_t scratch_scalars(const Pooling& p, bool channels_last) {
  constexpr int64_t lanes = kLanes;
  const auto padded = [](int64_t n) { return (n + lanes - 1) / lanes * lanes; };
  if (channels_last) return 2 * p.span_h() * p.width * padded(p.channels) + 2 * padded(p.channels);
  return 2 * p.span_h() * p.row_length() + 2 * padded(p.width) + padded(p.out_width) + padded(p.height * p.width);
}

#define FUSEDRES_DECLARE_MAX_POOL(isa)         \
  namespace isa {                              \
  template <class T>                           \
  const MaxPoolKernels<T>& max_pool_kernels(); \
  }
FUSEDRES_DECLARE_MAX_POOL(baseline)
FUSEDRES_DECLARE_MAX_POOL(avx2)
FUSEDRES_DECLARE_MAX_POOL(avx512)
#undef FUSEDRES_DECLARE_MAX_POOL

}  // namespace fusedres::cpu
