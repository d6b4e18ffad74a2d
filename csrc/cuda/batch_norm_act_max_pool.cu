// max_pool(act(bn(x))); see fusedres/ops/batch_norm_act_max_pool.py for the mathematics.
//
// Forward: the statistics of csrc/cuda/reduce.h, then one pass in which a thread normalises the pixels of a window as
// it takes their maximum. Backward: a pass over the windows finds their winners again by the same arithmetic, notes
// them in one byte each and sums what the parameters need; after what follows from the sums, a pass over the pixels of
// x gathers the gradients of the windows that each of them has won. Neighbouring windows share pixels, which the caches
// see.
//
// Bytes per element of x of size s, with r windows per element (1/4 in a ResNet): forward reads 2s (s in evaluation)
// and writes rs; backward reads 2s + 2rs + r and writes s + r (reads s + 2rs + r in evaluation).
#include <torch/csrc/stable/library.h>

#include <climits>
#include <cstring>
#include <tuple>
#include <type_traits>

#include "common/max_pool.h"
#include "common/pool_plan.h"
#include "cuda/batch_norm.h"

namespace fusedres {
namespace {

// Blocks that an SM can have at least, which leaves 128 and 168 registers per thread.
constexpr int kBlocks = 4, kWinnersBlocks = 3;

// Sizes of windows, in the registers of a thread.
struct Window {
  int height, width, out_height, out_width;
  int kernel_h, kernel_w, stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w;
};

struct Strides {
  int64_t n, c, h, w;
};

template <typename T>
struct PoolArguments {
  PoolPlan plan;
  bool reverse;
  Window window;
  Strides of_x, of_y;  // of_y: out, dy and winners
  bool relu;
  bool from_running;  // evaluation: the statistics are those of the running ones, and are saved here
  NormPointers<T> norm;
  T* out;
  const T* dy;
  uint8_t* winners;      // positions in the windows, or null
  Compute<T>* partials;  // (2, chunks, C), or null: sums of g and of g * (x - mean)
  GradientPointers<T> to;
  T* dx;
};

// One access of the size of V, which nvcc might otherwise take apart.
template <int kBytes>
using Access = std::conditional_t<
    kBytes == 16,
    uint4,
    std::conditional_t<
        kBytes == 8,
        uint2,
        std::conditional_t<kBytes == 4, unsigned, std::conditional_t<kBytes == 2, unsigned short, unsigned char>>>>;

template <typename V>
__device__ inline V load_whole(const void* from) {
  const auto bytes = *static_cast<const Access<sizeof(V)>*>(from);
  V value;
  memcpy(&value, &bytes, sizeof(V));
  return value;
}

template <typename V>
__device__ inline void store_whole(void* to, const V& value) {
  Access<sizeof(V)> bytes;
  memcpy(&bytes, &value, sizeof(V));
  __stcg(static_cast<Access<sizeof(V)>*>(to), bytes);
}

// ---- windows ----

// Kernel positions [first, last) that lie inside the input, for a window that starts at `start` (which may be < 0).
struct Taps {
  int first, last;

  __device__ Taps(int start, int kernel, int dilation, int size) {
    if (dilation == 1) {
      first = max(-start, 0);
      last = min(size - start, kernel);
    } else {
      first = start < 0 ? (-start + dilation - 1) / dilation : 0;
      last = min((size - start + dilation - 1) / dilation, kernel);
    }
  }
  // The position itself or the nearest one inside, which is one of the window's as well.
  __device__ int nearest(int k) const { return min(max(k, first), last - 1); }
};

// Where a window lies in the input.
struct WindowPlace {
  int h, w;  // of its first position
  Taps taps_h, taps_w;

  __device__ WindowPlace(const Window& p, int row, int column)
      : h(row * p.stride_h - p.pad_h),
        w(column * p.stride_w - p.pad_w),
        taps_h(h, p.kernel_h, p.dilation_h, p.height),
        taps_w(w, p.kernel_w, p.dilation_w, p.width) {}

  __device__ int64_t offset(const Window& p, const Strides& s, int kh, int kw) const {
    return (h + kh * p.dilation_h) * s.h + (w + kw * p.dilation_w) * s.w;
  }
};

// Calls f(pixels, position) for the positions of a window in order; `x` is the image's first pixel. kKernel: the size
// of the kernel, whose loops are unrolled, or 0 for any. Unrolled, positions in the padding are replaced by
// repetitions.
template <int kKernel, int K, typename T, typename F>
__device__ inline void visit_window(
    const T* __restrict__ x, const Window& p, const Strides& s, const WindowPlace& place, const F& f) {
  const auto pixels = [&](int kh, int kw) { return load_whole<Vector<T, K>>(x + place.offset(p, s, kh, kw)); };
  if constexpr (kKernel > 0) {
#pragma unroll
    for (int h = 0; h < kKernel; ++h) {
      const int kh = place.taps_h.nearest(h);
      Vector<T, K> row[kKernel];
#pragma unroll
      for (int w = 0; w < kKernel; ++w) row[w] = pixels(kh, place.taps_w.nearest(w));
#pragma unroll
      for (int w = 0; w < kKernel; ++w) f(row[w], kh * kKernel + place.taps_w.nearest(w));
    }
  } else {
    for (int kh = place.taps_h.first; kh < place.taps_h.last; ++kh) {
      for (int kw = place.taps_w.first; kw < place.taps_w.last; ++kw) f(pixels(kh, kw), kh * p.kernel_w + kw);
    }
  }
}

// The best of a window so far, for K channels: the first of the largest, or the last NaN.
template <typename T, int K>
struct Winner {
  using A = Compute<T>;
  A value[K];
  int position[K];

  __device__ explicit Winner(int first) {
#pragma unroll
    for (int i = 0; i < K; ++i) {
      value[i] = static_cast<A>(-INFINITY);
      position[i] = first;
    }
  }
  template <bool kRelu>
  __device__ void consider(const A (&y)[K], int at) {
#pragma unroll
    for (int i = 0; i < K; ++i) {
      const bool better = y[i] > value[i] || y[i] != y[i];
      value[i] = better ? y[i] : value[i];
      position[i] = better ? at : position[i];
    }
  }
  __device__ bool is_open(int i, bool relu) const { return !(relu && value[i] <= 0); }
  __device__ T activation(int i, bool relu) const { return is_open(i, relu) ? value[i] : T(0); }
  __device__ int at(int i) const { return position[i]; }
  // Whether `at` may be that of another NaN than the last, which `consider_nan` then finds.
  __device__ bool has_nan() const { return false; }
  __device__ void consider_nan(const A (&)[K], int) {}
};

// Two bytes: the rounded activation above 65535 - position, so that one integer maximum finds both. With a ReLU values
// below zero are in the wrong order, but which of them wins does not matter.
template <typename T, int K>
struct WinnerOfHalves {
  static constexpr int kInfinity = std::is_same_v<T, c10::Half> ? 0x7c00 : 0x7f80;
  int key[K];

  __device__ explicit WinnerOfHalves(int) {
#pragma unroll
    for (int i = 0; i < K; ++i) key[i] = INT_MIN;
  }
  template <bool kRelu>
  __device__ void consider(const float (&y)[K], int at) {
    Vector<T, K> rounded;
#pragma unroll
    for (int i = 0; i < K; ++i) rounded.at[i] = static_cast<T>(y[i]);
    constexpr int kTogether = K > 1 ? 2 : 1;
    Access<kTogether * sizeof(T)> words[K / kTogether];  // pairs are converted together
    memcpy(words, &rounded, sizeof(rounded));
#pragma unroll
    for (int i = 0; i < K; ++i) {
      const unsigned word = words[i / kTogether];
      unsigned upper = i % kTogether == 0 ? word << 16 : word & 0xffff0000u;
      // The host's conversion may give a NaN with a sign.
      if (std::is_same_v<T, c10::Half> && y[i] != y[i]) upper = 0x7fff0000u;
      if (!kRelu && upper & 0x80000000u) upper = 0x80000000u - upper;  // in order, with one zero
      key[i] = max(key[i], static_cast<int>(upper | (0xffff - at)));
    }
  }
  __device__ bool is_open(int i, bool relu) const { return !relu || key[i] >> 16 > 0; }
  __device__ T activation(int i, bool relu) const {
    const int bits = key[i] >> 16;
    if (bits >= 0) return T(static_cast<uint16_t>(bits), T::from_bits());
    return relu ? T(0, T::from_bits()) : T(static_cast<uint16_t>(0x8000 | -bits), T::from_bits());
  }
  __device__ int at(int i) const { return 0xffff - (key[i] & 0xffff); }
  __device__ bool has_nan() const {
    int largest = key[0];
#pragma unroll
    for (int i = 1; i < K; ++i) largest = max(largest, key[i]);
    return largest >> 16 > kInfinity;
  }
  __device__ void consider_nan(const float (&y)[K], int at) {
#pragma unroll
    for (int i = 0; i < K; ++i) key[i] = y[i] != y[i] ? 0x7fff << 16 | (0xffff - at) : key[i];
  }
};

template <int K>
struct Winner<c10::BFloat16, K> : WinnerOfHalves<c10::BFloat16, K> {
  using WinnerOfHalves<c10::BFloat16, K>::WinnerOfHalves;
};
template <int K>
struct Winner<c10::Half, K> : WinnerOfHalves<c10::Half, K> {
  using WinnerOfHalves<c10::Half, K>::WinnerOfHalves;
};

// The winners of one window. The activations are rounded, for it is those that are pooled. Without kPositions only
// their values count.
template <int kKernel, bool kPositions, bool kRelu, typename T, int K>
__device__ inline Winner<T, K> find_winners(
    const PoolArguments<T>& a, const T* __restrict__ x, const Affine<Compute<T>, K>& bn, const WindowPlace& place) {
  using A = Compute<T>;
  const auto activations = [&](A(&y)[K], const Vector<T, K>& pixels) {
#pragma unroll
    for (int i = 0; i < K; ++i) y[i] = normalise(static_cast<A>(pixels.at[i]) - bn.mean[i], bn.scale[i], bn.shift[i]);
  };
  Winner<T, K> best(place.taps_h.first * a.window.kernel_w + place.taps_w.first);
  visit_window<kKernel, K>(x, a.window, a.of_x, place, [&](const Vector<T, K>& pixels, int at) {
    A y[K];
    activations(y, pixels);
    best.template consider<kRelu>(y, at);
  });
  if (kPositions && best.has_nan()) {
    visit_window<0, K>(x, a.window, a.of_x, place, [&](const Vector<T, K>& pixels, int at) {
      A y[K];
      activations(y, pixels);
      best.consider_nan(y, at);
    });
  }
  return best;
}

template <int kKernel, bool kPositions, typename T, int K>
__device__ inline Winner<T, K> find_winners(
    const PoolArguments<T>& a, const T* __restrict__ x, const Affine<Compute<T>, K>& bn, const WindowPlace& place) {
  if (sizeof(T) > 2 || a.relu) return find_winners<kKernel, kPositions, true>(a, x, bn, place);
  return find_winners<kKernel, kPositions, false>(a, x, bn, place);
}

// ---- blocks ----

template <typename T, int K>
using PoolColumns = BlockColumns<T, K != 1>;

// Calls f(image, row, column) for the positions of this thread.
template <typename F>
__device__ inline void for_each_position(const PoolPlan& plan, const BlockPlace& block, const F& f) {
  const Patches& s = plan.patches;
  const int y = thread_y(plan.tiles), w = y & (s.threads_w - 1), h = y / s.threads_w;
  const int64_t end = min((block.chunk + 1) * plan.pass.chunk, s.count);
#pragma unroll 1
  for (int64_t patch = block.chunk * plan.pass.chunk; patch < end; ++patch) {
    const int64_t image = patch / s.per_image;
    const int within = static_cast<int>(patch - image * s.per_image);
    const int down = within / s.across;
    const int column = (within - down * s.across) * s.columns + w;
    if (w >= s.columns || column >= s.width) continue;
    const int last = min((down + 1) * s.rows, s.height);
#pragma unroll 1
    for (int row = down * s.rows + h; row < last; row += s.threads_h) f(image, row, column);
  }
}

template <typename T, int K>
__device__ inline int64_t first_channel(const PoolPlan& plan, const BlockPlace& block) {
  return (block.tile * plan.tiles.threads_x + thread_x(plan.tiles)) * K;
}

template <typename T, int K, int kKernel>
__global__ void __launch_bounds__(plan::kPoolThreads, kBlocks) pool_kernel(const __grid_constant__ PoolArguments<T> a) {
  const BlockPlace block(a.plan.tiles, a.plan.pass, blockIdx.x, a.reverse);
  const PoolColumns<T, K> columns(a.plan.tiles, block);
  auto* parameters = dynamic_shared_memory<Compute<T>>();
  fill_parameters(parameters, columns, a.norm, a.from_running, a.from_running && block.chunk == 0);
  __syncthreads();
  const int64_t channel = first_channel<T, K>(a.plan, block);
  if (channel >= a.plan.tiles.channels) return;
  Affine<Compute<T>, K> bn;
  get_affine(bn, parameters, columns.count, a.plan.tiles);
  for_each_position(a.plan, block, [&](int64_t image, int row, int column) {
    const T* x = a.norm.x + image * a.of_x.n + channel * a.of_x.c;
    const auto best = find_winners<kKernel, false>(a, x, bn, WindowPlace(a.window, row, column));
    Vector<T, K> out;
#pragma unroll
    for (int i = 0; i < K; ++i) out.at[i] = best.activation(i, a.relu);
    const int64_t to = image * a.of_y.n + channel * a.of_y.c + row * a.of_y.h + column * a.of_y.w;
    store_whole(a.out + to, out);
  });
}

// Finds the winners, and sums the gradients that go to them.
template <typename T, int K, int kKernel>
__global__ void __launch_bounds__(plan::kPoolThreads, kWinnersBlocks)
    pool_winners_kernel(const __grid_constant__ PoolArguments<T> a) {
  using A = Compute<T>;
  const Tiles& t = a.plan.tiles;
  const BlockPlace block(t, a.plan.pass, blockIdx.x, a.reverse);
  const PoolColumns<T, K> columns(t, block);
  auto* scratch = dynamic_shared_memory<double>();
  auto* parameters = reinterpret_cast<A*>(scratch + fold_size<2, K>());
  __shared__ int64_t offsets[kNoWinner];  // of the positions of a window from its first one
  for (int k = threadIdx.x; k < a.window.kernel_h * a.window.kernel_w; k += blockDim.x) {
    const int kh = k / a.window.kernel_w, kw = k - kh * a.window.kernel_w;
    offsets[k] = kh * a.window.dilation_h * a.of_x.h + kw * a.window.dilation_w * a.of_x.w;
  }
  fill_parameters(parameters, columns, a.norm, false, false);
  __syncthreads();
  const int64_t channel = first_channel<T, K>(a.plan, block);
  A sums[2][K] = {};
  if (channel < t.channels) {
    Affine<A, K> bn;
    get_affine(bn, parameters, columns.count, t);
    for_each_position(a.plan, block, [&](int64_t image, int row, int column) {
      const T* x = a.norm.x + image * a.of_x.n + channel * a.of_x.c;
      const int64_t o = image * a.of_y.n + channel * a.of_y.c + row * a.of_y.h + column * a.of_y.w;
      const auto dy = load_whole<Vector<T, K>>(a.dy + o);
      const WindowPlace place(a.window, row, column);
      const auto best = find_winners<kKernel, true>(a, x, bn, place);
      const int64_t corner = place.offset(a.window, a.of_x, 0, 0);
      Vector<uint8_t, K> winners;
#pragma unroll
      for (int i = 0; i < K; ++i) {
        const bool is_open = best.is_open(i, a.relu);
        const int at = best.at(i);
        winners.at[i] = is_open ? static_cast<uint8_t>(at) : kNoWinner;
        const A g = is_open ? static_cast<A>(dy.at[i]) : A(0);
        const A centred = static_cast<A>(x[corner + offsets[at] + i]) - bn.mean[i];
        sums[0][i] += g;
        sums[1][i] = is_open ? multiply_add(g, centred, sums[1][i]) : sums[1][i];
      }
      if (a.winners != nullptr) store_whole(a.winners + o, winners);
    });
  }
  if (a.partials == nullptr) return;
  double totals[2][K];
#pragma unroll
  for (int i = 0; i < K; ++i) {
    totals[0][i] = sums[0][i];
    totals[1][i] = sums[1][i];
  }
  fold_rows(totals, scratch, t.threads_x, t.threads_y);
  write_partials(a.partials, totals, t, a.plan.pass, block);
}

// What one thread of the last pass knows of its channels.
template <typename T, int K>
struct Gradient {
  using A = Compute<T>;
  Affine<A, K> bn;
  A of_x[K], constant[K];

  __device__ void store(const PoolArguments<T>& a, int64_t i, const Vector<T, K>& x, const A (&g)[K]) const {
    Vector<T, K> dx;
#pragma unroll
    for (int k = 0; k < K; ++k) {
      const A inner = multiply_add(of_x[k], static_cast<A>(x.at[k]) - bn.mean[k], constant[k]);
      dx.at[k] = static_cast<T>(a.norm.training ? multiply_add(bn.scale[k], g[k], inner) : bn.scale[k] * g[k]);
    }
    store_whole(a.dx + i, dx);
  }
  __device__ Vector<T, K> load_x(const PoolArguments<T>& a, int64_t i) const {
    return a.norm.training ? load_whole<Vector<T, K>>(a.norm.x + i) : Vector<T, K>{};
  }
};

// The gradient that one window sends to each of its K channels, and where.
template <typename T, int K>
struct Sent {
  Vector<T, K> dy;
  Vector<uint8_t, K> winners;

  __device__ void load(const PoolArguments<T>& a, int64_t o) {
    dy = load_whole<Vector<T, K>>(a.dy + o);
    winners = load_whole<Vector<uint8_t, K>>(a.winners + o);
  }
  __device__ void add_to(Compute<T> (&g)[K], int at) const {
#pragma unroll
    for (int k = 0; k < K; ++k) {
      if (winners.at[k] == at) g[k] += static_cast<Compute<T>>(dy.at[k]);
    }
  }
};

// Positions are pixels.
template <typename T, int K>
__device__ inline void gradient_of_pixel(
    const PoolArguments<T>& a, const Gradient<T, K>& gradient, int64_t channel, int64_t image, int row, int column) {
  const Window& p = a.window;
  const int64_t i = image * a.of_x.n + channel * a.of_x.c + row * a.of_x.h + column * a.of_x.w;
  const Vector<T, K> x = gradient.load_x(a, i);
  Compute<T> g[K] = {};
  for (int kh = 0; kh < p.kernel_h; ++kh) {
    const int from_h = row + p.pad_h - kh * p.dilation_h, oh = from_h / p.stride_h;
    if (from_h < 0) break;
    if (oh * p.stride_h != from_h || oh >= p.out_height) continue;
    for (int kw = 0; kw < p.kernel_w; ++kw) {
      const int from_w = column + p.pad_w - kw * p.dilation_w, ow = from_w / p.stride_w;
      if (from_w < 0) break;
      if (ow * p.stride_w != from_w || ow >= p.out_width) continue;
      Sent<T, K> sent;
      sent.load(a, image * a.of_y.n + channel * a.of_y.c + oh * a.of_y.h + ow * a.of_y.w);
      sent.add_to(g, kh * p.kernel_w + kw);
    }
  }
  gradient.store(a, i, x, g);
}

// Positions are pairs of pixels, for windows 3x3 with stride 2, padding 1 and dilation 1: pixel 2w is position 1 of
// window w in its row, and pixel 2w + 1 is position 2 of window w and 0 of the next. Columns of pixels likewise.
template <typename T, int K>
__device__ inline void gradient_of_pair(
    const PoolArguments<T>& a, const Gradient<T, K>& gradient, int64_t channel, int64_t image, int row, int column) {
  const Window& p = a.window;
  const int64_t first_i = image * a.of_x.n + channel * a.of_x.c + row * a.of_x.h + 2 * column * a.of_x.w;
  const int64_t first_o = image * a.of_y.n + channel * a.of_y.c + (row / 2) * a.of_y.h + column * a.of_y.w;
  const bool is_odd = row % 2 != 0, is_pair = 2 * column + 1 < p.width, has_next = column + 1 < p.out_width;
  const bool has_row[2] = {true, is_odd && row / 2 + 1 < p.out_height};
  const int in_row[2] = {is_odd ? 6 : 3, 0};  // the position in the windows' rows
  Vector<T, K> x[2];
  x[0] = gradient.load_x(a, first_i);
  if (is_pair) x[1] = gradient.load_x(a, first_i + a.of_x.w);
  Compute<T> g[2][K] = {};
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    if (!has_row[h]) continue;
    Sent<T, K> own, next;
    own.load(a, first_o + h * a.of_y.h);
    if (has_next) next.load(a, first_o + h * a.of_y.h + a.of_y.w);
    own.add_to(g[0], in_row[h] + 1);
    own.add_to(g[1], in_row[h] + 2);
    if (has_next) next.add_to(g[1], in_row[h]);
  }
  gradient.store(a, first_i, x[0], g[0]);
  if (is_pair) gradient.store(a, first_i + a.of_x.w, x[1], g[1]);
}

template <typename T, int K, bool kPairs>
__global__ void __launch_bounds__(plan::kPoolThreads, kBlocks)
    pool_gradient_kernel(const __grid_constant__ PoolArguments<T> a) {
  using A = Compute<T>;
  const Tiles& t = a.plan.tiles;
  const BlockPlace block(t, a.plan.pass, blockIdx.x, a.reverse);
  const PoolColumns<T, K> columns(t, block);
  auto* parameters = dynamic_shared_memory<A>();
  auto* coefficients = parameters + kAffineParameters * columns.count;
  fill_parameters(parameters, columns, a.norm, false, false);
  columns.for_each([&](int i) {
    const A* from = a.to.coefficients;
    const int64_t c = columns.channel(i);
    coefficients[i] = from != nullptr ? from[c] : A(0);
    coefficients[columns.count + i] = from != nullptr ? from[t.channels + c] : A(0);
  });
  __syncthreads();
  const int64_t channel = first_channel<T, K>(a.plan, block);
  if (channel >= t.channels) return;
  Gradient<T, K> gradient;
  get_affine(gradient.bn, parameters, columns.count, t);
  get_columns(gradient.of_x, coefficients, t);
  get_columns(gradient.constant, coefficients + columns.count, t);
  for_each_position(a.plan, block, [&](int64_t image, int row, int column) {
    if constexpr (kPairs) {
      gradient_of_pair(a, gradient, channel, image, row, column);
    } else {
      gradient_of_pixel(a, gradient, channel, image, row, column);
    }
  });
}

// ---- launches ----

constexpr int kWindowChunksPerSm = 12, kPixelChunksPerSm = 32;
constexpr int64_t kMostExtent = 1 << 30;  // coordinates and sizes of windows fit in an int

Window window_of(const Pooling& p) {
  for (const int64_t extent :
       {p.height,
        p.width,
        p.height + 2 * p.pad_h,
        p.width + 2 * p.pad_w,
        p.kernel_h * p.dilation_h,
        p.kernel_w * p.dilation_w}) {
    STD_TORCH_CHECK(extent <= kMostExtent, "x or its windows are too large");
  }
  const auto narrow = [](int64_t n) { return static_cast<int>(n); };
  return {
      narrow(p.height),
      narrow(p.width),
      narrow(p.out_height),
      narrow(p.out_width),
      narrow(p.kernel_h),
      narrow(p.kernel_w),
      narrow(p.stride_h),
      narrow(p.stride_w),
      narrow(p.pad_h),
      narrow(p.pad_w),
      narrow(p.dilation_h),
      narrow(p.dilation_w)};
}

Strides strides_of(const Layout4d& layout) {
  const auto s = layout.strides();
  return {s[0], s[1], s[2], s[3]};
}

// The passes of one call, which share all arguments but the plan.
template <typename T>
class PoolLauncher {
 public:
  PoolLauncher(const Layout4d& layout, const Pooling& pooling, const Tensor& x, const DeviceScope& device)
      : layout_(layout), pooling_(pooling), sms_(plan_device(x).sms), stream_(device.stream()) {
    arguments.window = window_of(pooling);
    arguments.of_x = strides_of(layout);
    arguments.of_y = strides_of(pooled_layout(layout, pooling));
  }

  PoolArguments<T> arguments{};

  // To be called when the pointers are known: whether a thread has a vector of channels.
  void choose_vectors(std::initializer_list<const void*> pointers) {
    vectors_ = layout_.channels_last && layout_.channels % kVector<T> == 0 && is_aligned(kVectorBytes, pointers);
  }

  PoolPlan plan_windows() const { return plan(pooling_.out_height, pooling_.out_width, kWindowChunksPerSm); }

  void forward() {
    arguments.plan = plan_windows();
    arguments.reverse = arguments.norm.training;
    auto* kernel = is_three() ? (vectors_ ? pool_kernel<T, kVector<T>, 3> : pool_kernel<T, 1, 3>)
                              : (vectors_ ? pool_kernel<T, kVector<T>, 0> : pool_kernel<T, 1, 0>);
    launch(kernel, kAffineParameters, 0);
  }

  void winners(const PoolPlan& windows) {
    arguments.plan = windows;
    arguments.reverse = false;
    auto* kernel = is_three() ? (vectors_ ? pool_winners_kernel<T, kVector<T>, 3> : pool_winners_kernel<T, 1, 3>)
                              : (vectors_ ? pool_winners_kernel<T, kVector<T>, 0> : pool_winners_kernel<T, 1, 0>);
    launch(kernel, kAffineParameters, 2 * (windows.tiles.threads() / 2) * lanes());
  }

  void gradient() {
    const Pooling& p = pooling_;
    const bool pairs = is_three() && p.stride_h == 2 && p.stride_w == 2 && p.pad_h == 1 && p.pad_w == 1 &&
                       p.dilation_h == 1 && p.dilation_w == 1;
    arguments.plan = plan(p.height, pairs ? ceil_div(p.width, 2) : p.width, kPixelChunksPerSm);
    arguments.reverse = true;
    auto* kernel = pairs ? (vectors_ ? pool_gradient_kernel<T, kVector<T>, true> : pool_gradient_kernel<T, 1, true>)
                         : (vectors_ ? pool_gradient_kernel<T, kVector<T>, false> : pool_gradient_kernel<T, 1, false>);
    launch(kernel, kAffineParameters + 2, 0);
  }

 private:
  bool is_three() const { return pooling_.kernel_h == 3 && pooling_.kernel_w == 3; }
  int lanes() const { return vectors_ ? kVector<T> : 1; }

  PoolPlan plan(int64_t height, int64_t width, int most_chunks_per_sm) const {
    const PoolProblem problem = {
        layout_.channels_last, layout_.batch, layout_.channels, height, width, lanes(), layout_.numel()};
    return plan_pool(problem, sms_, most_chunks_per_sm);
  }

  void launch(void (*kernel)(const PoolArguments<T>), int parameters, int64_t doubles) const {
    const Tiles& t = arguments.plan.tiles;
    const int64_t shared = sizeof(Compute<T>) * parameters * t.threads_x * lanes() + sizeof(double) * doubles;
    launch_with_shared(kernel, t.tiles * arguments.plan.pass.chunks, t.threads(), shared, stream_, arguments);
  }

  const Layout4d layout_;
  const Pooling pooling_;
  const int sms_;
  const cudaStream_t stream_;
  bool vectors_ = false;
};

std::tuple<Tensor, Tensor> batch_norm_act_max_pool_cuda(
    const Tensor& x,
    const OptionalTensor& weight,
    const OptionalTensor& bias,
    const OptionalTensor& running_mean,
    const OptionalTensor& running_var,
    const OptionalTensor& num_batches_tracked,
    bool training,
    std::optional<double> momentum,
    double eps,
    bool relu,
    Ints kernel,
    Ints stride,
    Ints padding,
    Ints dilation,
    bool ceil_mode) {
  const Layout4d layout = layout_of(x);
  const NormArguments arguments{weight, bias, running_mean, running_var, num_batches_tracked, training, momentum, eps};
  check_norm(arguments, x, layout);
  const Pooling pooling = pooling_of(layout, kernel, stride, padding, dilation, ceil_mode);
  const DeviceScope device(x);
  Tensor out = empty_pooled(pooled_layout(layout, pooling), x);
  Tensor stats = empty_statistics(layout, x);
  const LaunchPlan plan = plan_launches(plan_problem(layout, x, 1, training, false), plan_device(x), false);
  const Tensor workspace = empty_vector(training ? plan.partial_bytes : 0, ScalarType::Byte, x);
  dispatch_floating(x.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    PoolLauncher<T> launcher(layout, pooling, x, device);
    PoolArguments<T>& a = launcher.arguments;
    a.norm = norm_pointers<T>(arguments, x, stats);
    a.relu = relu;
    a.from_running = !training;
    a.out = data<T>(out);
    launcher.choose_vectors({a.norm.x, a.out});
    if (training) launch_statistics(&a.norm, 1, plan, layout.channels_last, workspace, device.stream());
    launcher.forward();
  });
  return {out, stats};
}

std::tuple<Tensor, Tensor, Tensor> batch_norm_act_max_pool_backward_cuda(
    const Tensor& dy,
    const Tensor& x,
    const OptionalTensor& weight,
    const OptionalTensor& bias,
    const Tensor& stats,
    bool training,
    bool relu,
    Ints kernel,
    Ints stride,
    Ints padding,
    Ints dilation,
    bool ceil_mode,
    bool need_dx,
    bool need_affine) {
  const Layout4d layout = layout_of(x);
  STD_TORCH_CHECK(layout.numel() > 0, "x must not be empty");
  const Pooling pooling = pooling_of(layout, kernel, stride, padding, dilation, ceil_mode);
  const Layout4d pooled = pooled_layout(layout, pooling);
  check_pooled("dy", dy, pooled, x);
  check_channel_vectors({&weight, &bias}, x, layout.channels);
  check_statistics(stats, x, layout.channels);
  const DeviceScope device(x);
  Tensor dx = wanted_like(need_dx, x);
  Tensor dweight = wanted_parameter_gradient(need_affine, weight, stats);
  Tensor dbias = wanted_parameter_gradient(need_affine, weight, stats);
  const Tensor winners = empty_vector(need_dx ? pooled.numel() : 0, ScalarType::Byte, x);
  const bool sums = need_affine || (training && need_dx);
  dispatch_floating(x.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    using A = Compute<T>;
    PoolLauncher<T> launcher(layout, pooling, x, device);
    PoolArguments<T>& a = launcher.arguments;
    a.norm = norm_pointers<T>({weight, bias, {}, {}, {}, training, 0.0, 0.0}, x, stats);
    a.relu = relu;
    a.dy = static_cast<const T*>(dy.const_data_ptr());
    a.winners = need_dx ? data<uint8_t>(winners) : nullptr;
    a.dx = need_dx ? data<T>(dx) : nullptr;
    launcher.choose_vectors({a.norm.x, a.dy, a.dx});
    const PoolPlan windows = launcher.plan_windows();
    const int64_t partials = sums ? 2 * windows.pass.chunks * layout.channels : 0;
    const Tensor workspace = empty_vector((partials + 2 * layout.channels) * sizeof(A), ScalarType::Byte, x);
    a.partials = sums ? data<A>(workspace) : nullptr;
    launcher.winners(windows);
    if (sums) {
      a.to = {channel_vector<T>(dweight), channel_vector<T>(dbias), training ? data<A>(workspace) + partials : nullptr};
      launch_finish_gradients<T>(
          {windows.tiles, windows.pass.chunks, 1, a.partials, {a.norm, {}}, {a.to, {}}},
          plan::finish_threads(windows.pass.chunks),
          device.stream());
    }
    if (need_dx) launcher.gradient();
  });
  return {dx, dweight, dbias};
}

STABLE_TORCH_LIBRARY_IMPL(fusedres, CUDA, m) {
  m.impl("batch_norm_act_max_pool", TORCH_BOX(&batch_norm_act_max_pool_cuda));
  m.impl("batch_norm_act_max_pool_backward", TORCH_BOX(&batch_norm_act_max_pool_backward_cuda));
}

}  // namespace
}  // namespace fusedres
