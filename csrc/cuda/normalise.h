// One batch normalisation on the device: its tensors, and the numbers per channel that the kernels take.
#pragma once

#include <cuda_runtime.h>

#include <cmath>
#include <cstdint>

#include "cuda/tile.h"

namespace fusedres {

// One value per channel, in the dtype of x or in the compute type, with any stride. No data: the vector is absent.
template <typename T>
struct ChannelVector {
  void* data;
  int64_t stride;
  bool is_wide;  // of the compute type

  __device__ Compute<T> get(int64_t c, Compute<T> otherwise) const {
    if (data == nullptr) return otherwise;
    if (is_wide) return static_cast<const Compute<T>*>(data)[c * stride];
    return static_cast<Compute<T>>(static_cast<const T*>(data)[c * stride]);
  }
  __device__ void set(int64_t c, double value) const {
    const auto wide = static_cast<Compute<T>>(value);
    if (is_wide) {
      static_cast<Compute<T>*>(data)[c * stride] = wide;
    } else {
      static_cast<T*>(data)[c * stride] = static_cast<T>(wide);
    }
  }
};

template <typename T>
struct NormPointers {
  const T* x;
  ChannelVector<T> weight, bias, running_mean, running_var;
  int64_t* counter;   // of batches, or null
  Compute<T>* stats;  // (3, C): mean, rstd, and the part of the mean below their resolution
  bool training;
  double momentum;  // NaN: 1/counter
  double eps;
  double* exchanged;  // or null: where mean, M2 and count go, (2C + 1), in place of all statistics above
};

__device__ inline bool is_finite(double v) { return v - v == 0; }

__device__ inline float multiply_add(float a, float b, float c) { return fmaf(a, b, c); }
__device__ inline double multiply_add(double a, double b, double c) { return fma(a, b, c); }

// The statistics of one channel, as they are saved.
template <typename A>
struct ChannelStatistics {
  A mean, rstd, mean_low;

  __device__ static ChannelStatistics from(double mean, double var, double eps) {
    const A high = static_cast<A>(mean);
    // Zero where the mean is not finite: Inf - Inf would turn an infinite mean into NaN.
    const A low = is_finite(mean) ? static_cast<A>(mean - static_cast<double>(high)) : A(0);
    return {high, static_cast<A>(1.0 / sqrt(var + eps)), low};
  }
  __device__ static ChannelStatistics load(const A* stats, int64_t channels, int64_t c) {
    return {stats[c], stats[channels + c], stats[2 * channels + c]};
  }
  __device__ void store(A* stats, int64_t channels, int64_t c) const {
    stats[c] = mean;
    stats[channels + c] = rstd;
    stats[2 * channels + c] = mean_low;
  }
};

// From the statistics of the batch to the saved ones, of which it returns the channel's; moves the running ones.
template <typename T>
__device__ ChannelStatistics<Compute<T>> finish_channel(
    const NormPointers<T>& norm, const Tiles& t, int64_t c, double mean, double var) {
  if (norm.exchanged != nullptr) {
    const double count = static_cast<double>(t.numel / t.channels);
    norm.exchanged[c] = mean;
    norm.exchanged[t.channels + c] = var * count;
    if (c == 0) norm.exchanged[2 * t.channels] = count;
    return {};
  }
  const auto statistics = ChannelStatistics<Compute<T>>::from(mean, var, norm.eps);
  statistics.store(norm.stats, t.channels, c);
  if (norm.running_mean.data != nullptr) {
    const double factor = norm.momentum == norm.momentum ? norm.momentum : 1.0 / static_cast<double>(*norm.counter);
    const double count = static_cast<double>(t.numel / t.channels);
    const double unbiased = var * (count / (count - 1));
    norm.running_mean.set(c, (1 - factor) * norm.running_mean.get(c, 0) + factor * mean);
    norm.running_var.set(c, (1 - factor) * norm.running_var.get(c, 0) + factor * unbiased);
  }
  return statistics;
}

// Of evaluation: from the running statistics.
template <typename T>
__device__ ChannelStatistics<Compute<T>> running_statistics(const NormPointers<T>& norm, int64_t c) {
  return ChannelStatistics<Compute<T>>::from(norm.running_mean.get(c, 0), norm.running_var.get(c, 0), norm.eps);
}

// y = (x - mean) * scale + shift. Forward and backward compute the sign of y from these same numbers by `normalise`,
// so that they agree to the bit.
template <typename A, int K>
struct Affine {
  A mean[K], scale[K], shift[K];
};

template <typename A>
__device__ inline A normalise(A centred, A scale, A shift) {
  return multiply_add(centred, scale, shift);
}

// The largest value that is stored as zero, or NaN without a ReLU: y is cut where y <= threshold, so NaN passes.
template <typename T>
__device__ inline Compute<T> relu_threshold(bool relu) {
  if (!relu) return static_cast<Compute<T>>(NAN);
  if constexpr (sizeof(T) != 2) {
    return 0;
  } else {
    // Half of the smallest number, a tie that rounds to even.
    const T smallest = T(0x0001, T::from_bits());
    return static_cast<Compute<T>>(smallest) * Compute<T>(0.5);
  }
}

// Column `column` of a block's parameters in shared memory, which has kParameters rows of `columns` numbers.
constexpr int kAffineParameters = 3;

template <typename T>
__device__ void put_affine(
    Compute<T>* parameters,
    int columns,
    int column,
    const NormPointers<T>& norm,
    int64_t c,
    const ChannelStatistics<Compute<T>>& s) {
  using A = Compute<T>;
  const A scale = norm.weight.get(c, 1) * s.rstd;
  const A bias = norm.bias.get(c, 0);
  parameters[column] = s.mean;
  parameters[columns + column] = scale;
  parameters[2 * columns + column] = s.mean_low == 0 ? bias : multiply_add(-s.mean_low, scale, bias);
}

// Columns of a block, and the channel of each.
template <typename T, bool kChannelsLast>
struct BlockColumns {
  int count;
  int64_t first, channels, columns;

  __device__ BlockColumns(const Tiles& t, const BlockPlace& block)
      : count(t.threads_x * kLanes<T, kChannelsLast>),
        first(block.tile * count),
        channels(t.channels),
        columns(t.columns) {}
  __device__ bool has(int i) const { return first + i < columns; }
  __device__ int64_t channel(int i) const {
    const int64_t column = first + i;
    return column < channels ? column : column % channels;
  }
  // Calls f(i) for every column of the block, each on one thread.
  template <typename F>
  __device__ void for_each(const F& f) const {
    for (int i = threadIdx.x; i < count; i += blockDim.x) {
      if (has(i)) f(i);
    }
  }
};

// Fills the parameters of a block's columns from the statistics, saved or running.
template <typename T, bool kChannelsLast>
__device__ void fill_parameters(
    Compute<T>* parameters,
    const BlockColumns<T, kChannelsLast>& columns,
    const NormPointers<T>& norm,
    bool from_running,
    bool save) {
  columns.for_each([&](int i) {
    const int64_t c = columns.channel(i);
    const auto s = from_running ? running_statistics(norm, c)
                                : ChannelStatistics<Compute<T>>::load(norm.stats, columns.channels, c);
    // The channels of folded pixels repeat; the first of them saves.
    if (save && columns.first + i < columns.channels) s.store(norm.stats, columns.channels, c);
    put_affine(parameters, columns.count, i, norm, c, s);
  });
}

// The numbers of this thread's columns from one row of parameters.
template <int K, typename A>
__device__ inline void get_columns(A (&to)[K], const A* row, const Tiles& t) {
  constexpr int kTogether = K * sizeof(A) >= 16 ? 16 / sizeof(A) : K;
  const int first = thread_x(t) * K;
#pragma unroll
  for (int i = 0; i < K; i += kTogether) {
    const auto part = *reinterpret_cast<const Vector<A, kTogether>*>(row + first + i);
#pragma unroll
    for (int j = 0; j < kTogether; ++j) to[i + j] = part.at[j];
  }
}

template <int K, typename A>
__device__ inline void get_affine(Affine<A, K>& to, const A* parameters, int columns, const Tiles& t) {
  get_columns(to.mean, parameters, t);
  get_columns(to.scale, parameters + columns, t);
  get_columns(to.shift, parameters + 2 * columns, t);
}

}  // namespace fusedres
