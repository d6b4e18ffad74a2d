// act(x + residual) and its backward: one pass over dense tensors in memory order.
//
// Bytes per element of size s: forward reads 2s, writes s + 1/8; backward reads s + 1/8, writes s. Nothing is computed,
// so speed is memory bandwidth: each thread keeps 2 * kUnroll (forward) or kUnroll (backward) accesses of 16 bytes in
// flight, and neighbouring threads touch neighbouring 16 bytes.
#include <torch/csrc/stable/library.h>

#include <tuple>
#include <type_traits>

#include "common/layout.h"
#include "cuda/launch.h"
#include "cuda/vector.h"

namespace fusedres {
namespace {

constexpr int kThreads = 256;
constexpr int kUnroll = 4;
constexpr int kVectorBytes = 16;
constexpr unsigned kWholeWarp = 0xffffffffu;

template <typename T>
using Compute = std::conditional_t<std::is_same_v<T, double>, double, float>;

// Bytes of the mask: one bit per element in memory order, in whole 16-bit words.
int64_t mask_bytes(int64_t numel) { return 2 * ceil_div(numel, 16); }

// Blocks that cover n elements rounded up to whole mask words, so that the padding bits are written too.
template <int V>
int64_t count_blocks(int64_t n) {
  return ceil_div(8 * mask_bytes(n), int64_t{V} * kThreads * kUnroll);
}

// The first vector of this thread; the next ones follow at a distance of kThreads.
__device__ inline int64_t first_vector() { return int64_t{blockIdx.x} * (kThreads * kUnroll) + threadIdx.x; }

// Whether all elements of this block are among the n.
template <int V>
__device__ bool is_whole(int64_t n) {
  return (int64_t{blockIdx.x} + 1) * (V * kThreads * kUnroll) <= n;
}

// The vectors of one thread, `first + u * kThreads` for u < kCount, loaded together. kWhole: all of them lie within n
// elements.
template <bool kWhole, int kCount, bool kRelu, bool kMask, int V, typename T>
__device__ void add_act_vectors(
    const T* __restrict__ x,
    const T* __restrict__ residual,
    T* __restrict__ out,
    uint8_t* __restrict__ mask,
    int64_t n,
    int64_t mask_bytes,
    int64_t first) {
  constexpr int kLanesPerByte = 8 / V;
  Vector<T, V> a[kCount], b[kCount];
#pragma unroll
  for (int u = 0; u < kCount; ++u) {
    load<kWhole>(a[u], x, first + u * kThreads, n);
    load<kWhole>(b[u], residual, first + u * kThreads, n);
  }
#pragma unroll
  for (int u = 0; u < kCount; ++u) {
    const int64_t v = first + u * kThreads;
    unsigned bits = 0;
#pragma unroll
    for (int i = 0; i < V; ++i) {
      Compute<T> y = static_cast<Compute<T>>(a[u].at[i]) + static_cast<Compute<T>>(b[u].at[i]);
      if (kRelu && y <= 0) y = 0;  // NaN passes
      a[u].at[i] = static_cast<T>(y);
      const bool keep = !(static_cast<Compute<T>>(a[u].at[i]) <= 0);  // of the rounded value
      bits |= unsigned{keep && (kWhole || v * V + i < n)} << i;
    }
    store<kWhole>(a[u], out, v, n);
    if constexpr (kMask) {
      // Neighbouring lanes hold the parts of one byte; the first of them writes it.
      const int part = threadIdx.x % kLanesPerByte;
      bits <<= part * V;
#pragma unroll
      for (int d = 1; d < kLanesPerByte; d *= 2) bits |= __shfl_xor_sync(kWholeWarp, bits, d);
      if (part == 0 && (kWhole || v * V / 8 < mask_bytes)) mask[v * V / 8] = static_cast<uint8_t>(bits);
    }
  }
}

template <typename T, int V, bool kRelu, bool kMask>
__global__ void __launch_bounds__(kThreads) add_act_kernel(
    const T* __restrict__ x,
    const T* __restrict__ residual,
    T* __restrict__ out,
    uint8_t* __restrict__ mask,
    int64_t n,
    int64_t mask_bytes) {
  const int64_t first = first_vector();
  if (is_whole<V>(n)) {
    add_act_vectors<true, kUnroll, kRelu, kMask, V>(x, residual, out, mask, n, mask_bytes, first);
  } else {
#pragma unroll 1
    for (int u = 0; u < kUnroll; ++u) {
      add_act_vectors<false, 1, kRelu, kMask, V>(x, residual, out, mask, n, mask_bytes, first + u * kThreads);
    }
  }
}

template <bool kWhole, int kCount, int V, typename T>
__device__ void add_act_backward_vectors(
    const T* __restrict__ dy, const uint8_t* __restrict__ mask, T* __restrict__ dx, int64_t n, int64_t first) {
  Vector<T, V> g[kCount];
  unsigned bits[kCount];
#pragma unroll
  for (int u = 0; u < kCount; ++u) {
    const int64_t v = first + u * kThreads;
    load<kWhole>(g[u], dy, v, n);
    bits[u] = kWhole || v * V < n ? mask[v * V / 8] >> (v * V % 8) : 0;
  }
#pragma unroll
  for (int u = 0; u < kCount; ++u) {
#pragma unroll
    for (int i = 0; i < V; ++i) {
      if (!(bits[u] >> i & 1)) g[u].at[i] = T(0.0f);
    }
    store<kWhole>(g[u], dx, first + u * kThreads, n);
  }
}

template <typename T, int V>
__global__ void __launch_bounds__(kThreads)
    add_act_backward_kernel(const T* __restrict__ dy, const uint8_t* __restrict__ mask, T* __restrict__ dx, int64_t n) {
  const int64_t first = first_vector();
  if (is_whole<V>(n)) {
    add_act_backward_vectors<true, kUnroll, V>(dy, mask, dx, n, first);
  } else {
#pragma unroll 1
    for (int u = 0; u < kUnroll; ++u) add_act_backward_vectors<false, 1, V>(dy, mask, dx, n, first + u * kThreads);
  }
}

std::tuple<Tensor, Tensor> add_act_cuda(const Tensor& x, const Tensor& residual, bool relu, bool save_mask) {
  check_dense("x", x);
  check_same_layout("residual", residual, x);
  check_same_device("residual", residual, x);
  const DeviceScope device(x);
  const int64_t n = x.numel();
  const int64_t bytes = save_mask ? mask_bytes(n) : 0;
  Tensor out = uninitialized_like(x);
  Tensor mask = empty_vector(bytes, ScalarType::Byte, x);
  if (n == 0) return {out, mask};

  dispatch_floating(x.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    const auto* x_data = static_cast<const T*>(x.const_data_ptr());
    const auto* residual_data = static_cast<const T*>(residual.const_data_ptr());
    auto* out_data = static_cast<T*>(out.mutable_data_ptr());
    auto* mask_data = static_cast<uint8_t*>(mask.mutable_data_ptr());
    const auto run = [&](auto width) {
      constexpr int V = decltype(width)::value;
      auto* kernel = relu ? (save_mask ? add_act_kernel<T, V, true, true> : add_act_kernel<T, V, true, false>)
                          : (save_mask ? add_act_kernel<T, V, false, true> : add_act_kernel<T, V, false, false>);
      launch(
          kernel, count_blocks<V>(n), kThreads, device.stream(), x_data, residual_data, out_data, mask_data, n, bytes);
    };
    if (is_aligned(kVectorBytes, {x_data, residual_data, out_data})) {
      run(std::integral_constant<int, kVectorBytes / sizeof(T)>{});
    } else {
      run(std::integral_constant<int, 1>{});
    }
  });
  return {out, mask};
}

Tensor add_act_backward_cuda(const Tensor& dy, const Tensor& mask) {
  check_dense("dy", dy);
  const int64_t n = dy.numel();
  STD_TORCH_CHECK(
      mask.scalar_type() == ScalarType::Byte && mask.dim() == 1 && mask.is_contiguous(),
      "mask must be a contiguous 1-D uint8 tensor");
  check_same_device("mask", mask, dy);
  STD_TORCH_CHECK(
      mask.numel() == mask_bytes(n),
      "mask must have ",
      mask_bytes(n),
      " bytes for the ",
      n,
      " elements of dy, but got ",
      mask.numel());
  const DeviceScope device(dy);
  Tensor dx = uninitialized_like(dy);
  if (n == 0) return dx;

  dispatch_floating(dy.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    const auto* dy_data = static_cast<const T*>(dy.const_data_ptr());
    const auto* mask_data = static_cast<const uint8_t*>(mask.const_data_ptr());
    auto* dx_data = static_cast<T*>(dx.mutable_data_ptr());
    const auto run = [&](auto width) {
      constexpr int V = decltype(width)::value;
      launch(
          add_act_backward_kernel<T, V>, count_blocks<V>(n), kThreads, device.stream(), dy_data, mask_data, dx_data, n);
    };
    if (is_aligned(kVectorBytes, {dy_data, dx_data})) {
      run(std::integral_constant<int, kVectorBytes / sizeof(T)>{});
    } else {
      run(std::integral_constant<int, 1>{});
    }
  });
  return dx;
}

STABLE_TORCH_LIBRARY_IMPL(fusedres, CUDA, m) {
  m.impl("add_act", TORCH_BOX(&add_act_cuda));
  m.impl("add_act_backward", TORCH_BOX(&add_act_backward_cuda));
}

}  // namespace
}  // namespace fusedres
