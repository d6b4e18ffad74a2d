// Sums per channel, in two deterministic stages: every block writes partial sums of its chunk, and one more launch adds
// them up in a fixed order, in double, and does what the sums are for.
//
// Statistics: a thread sums deviations, of at most a few dozen values, from the mean of its own first ones. The block
// finds its mean from these and moves what its threads have to it, as Chan, Golub and LeVeque (1979) do, so that
// nothing cancels whatever the mean; blocks are merged the same way in double.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "cuda/normalise.h"
#include "cuda/shared_memory.h"
#include "cuda/tile.h"

namespace fusedres {

// Adds up Q quantities for K columns over the rows of a block, into those of row 0. `scratch` has room for those of
// half the block.
template <int Q, int K, typename A>
__device__ void fold_rows(A (&mine)[Q][K], A* scratch, int threads_x, int threads_y) {
  const int t = threadIdx.x;
  for (int half = threads_y / 2; half > 0; half /= 2) {
    const int size = half * threads_x;
    if (t >= size && t < 2 * size) {
#pragma unroll
      for (int q = 0; q < Q; ++q) {
#pragma unroll
        for (int i = 0; i < K; ++i) scratch[(q * K + i) * size + t - size] = mine[q][i];
      }
    }
    __syncthreads();
    if (t < size) {
#pragma unroll
      for (int q = 0; q < Q; ++q) {
#pragma unroll
        for (int i = 0; i < K; ++i) mine[q][i] += scratch[(q * K + i) * size + t];
      }
    }
    __syncthreads();
  }
}

// Numbers of `scratch` for that.
template <int Q, int K>
__device__ int fold_size() {
  return Q * K * static_cast<int>(blockDim.x / 2);
}

// What the threads of row 0 have, to rows of `columns` numbers in shared memory.
template <int Q, int K>
__device__ void write_totals(double* rows, const double (&totals)[Q][K], int columns, const Tiles& t) {
  if (thread_y(t) != 0) return;
#pragma unroll
  for (int q = 0; q < Q; ++q) {
#pragma unroll
    for (int i = 0; i < K; ++i) rows[q * columns + thread_x(t) * K + i] = totals[q][i];
  }
}

// Adds a vector of values to the sums of its K channels.
template <int K, int V, typename A>
__device__ inline void add_vector(A (&sums)[K], const A (&values)[V]) {
  if constexpr (K == V) {
#pragma unroll
    for (int i = 0; i < V; ++i) sums[i] += values[i];
  } else {
    A part[V];
#pragma unroll
    for (int i = 0; i < V; ++i) part[i] = values[i];
#pragma unroll
    for (int n = V / 2; n > 0; n /= 2) {
#pragma unroll
      for (int i = 0; i < n; ++i) part[i] += part[i + n];
    }
    sums[0] += part[0];
  }
}

template <int K, int V, typename A>
__device__ inline void add_products(A (&sums)[K], const A (&a)[V], const A (&b)[V]) {
  if constexpr (K == V) {
#pragma unroll
    for (int i = 0; i < V; ++i) sums[i] = multiply_add(a[i], b[i], sums[i]);
  } else {
    A products[V];
#pragma unroll
    for (int i = 0; i < V; ++i) products[i] = a[i] * b[i];
    add_vector(sums, products);
  }
}

// One thread's part of the slab that a one-pass kernel keeps in shared memory: no other thread reads it.
template <typename T>
struct Slab {
  Vector<T, kVector<T>>* memory;

  __device__ void put(int k, const Vector<T, kVector<T>>& value) const {
    *reinterpret_cast<uint4*>(at(k)) = bytes_of(value);
  }
  __device__ void get(int k, Vector<T, kVector<T>>& value) const { load_16_bytes(value, at(k)); }
  __device__ Vector<T, kVector<T>>* at(int k) const { return memory + k * static_cast<int>(blockDim.x) + threadIdx.x; }
};

// Body for for_each_vector: sums of x - shift and of its square over the vectors of one thread.
template <typename T, bool kChannelsLast, bool kKeep>
struct Deviations {
  using A = Compute<T>;
  static constexpr int V = kVector<T>, K = kLanes<T, kChannelsLast>;

  const T* x;
  bool aligned;
  Slab<T> slab;
  A shift[K], sum[K], square[K];
  int count, tail;  // channels_last: rows, and elements of a partial one

  __device__ Deviations(const T* x_, bool aligned_, const Slab<T>& slab_)
      : x(x_), aligned(aligned_), slab(slab_), shift(), sum(), square(), count(0), tail(0) {}

  template <bool kFast, int kUnroll>
  __device__ void run(const Place (&places)[kUnroll], int k) {
    Vector<T, V> value[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) load_at<kFast>(value[u], x, places[u], aligned);
    if (k == 0) choose_shift(value, places);
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      if constexpr (kKeep) slab.put(k + u, value[u]);
      const int valid = places[u].valid;
      if (!kFast || valid > 0) {
        A d[V];
#pragma unroll
        for (int i = 0; i < V; ++i) {
          d[i] = static_cast<A>(value[u].at[i]) - shift[K == V ? i : 0];
          if (!kFast && i >= valid) d[i] = 0;
        }
        add_vector(sum, d);
        add_products(square, d, d);
      }
      if constexpr (kChannelsLast) {
        if (kFast || valid == V) {
          ++count;
        } else {
          tail = valid;
        }
      } else {
        count += valid;
      }
    }
  }

  // The mean of the first few values, which one outlier among them does not spoil; for equal values exact.
  template <int kUnroll>
  __device__ void choose_shift(const Vector<T, V> (&value)[kUnroll], const Place (&places)[kUnroll]) {
#pragma unroll
    for (int i = 0; i < K; ++i) {
      A first = 0;
      if constexpr (kChannelsLast) {
#pragma unroll
        for (int u = 0; u < kUnroll; ++u) first += static_cast<A>(value[u].at[i]);
        first /= kUnroll;
      } else if (places[0].valid == V) {
#pragma unroll
        for (int j = 0; j < V; ++j) first += static_cast<A>(value[0].at[j]);
        first /= V;
      } else {
        first = static_cast<A>(x[places[0].offset]);
      }
      shift[i] = is_finite(first) ? first : A(0);  // else it would spoil sums that are finite
    }
  }

  // On the threads of row 0: a value near the mean of the block, and the sums of x less that value and of its square.
  // `scratch` has room for two quantities of half the block, `totals_row` for one row of columns.
  __device__ void fold(double (&totals)[3][K], double* scratch, double* totals_row, const Tiles& t) const {
    const int first = thread_x(t) * K;
    const bool leads = thread_y(t) == 0;
    A* row = reinterpret_cast<A*>(totals_row);
    double sums[2][K];
    A from[K];
    const auto broadcast = [&] {
      if (leads) {
#pragma unroll
        for (int i = 0; i < K; ++i) row[first + i] = from[i];
      }
      __syncthreads();
#pragma unroll
      for (int i = 0; i < K; ++i) from[i] = row[first + i];
      __syncthreads();
    };
    // The mean, about the shift of row 0.
#pragma unroll
    for (int i = 0; i < K; ++i) from[i] = shift[i];
    broadcast();
#pragma unroll
    for (int i = 0; i < K; ++i) {
      sums[0][i] = count_of_lane(i);
      sums[1][i] = multiply_add(count_of_lane(i), shift[i] - from[i], sum[i]);
    }
    fold_rows(sums, scratch, t.threads_x, t.threads_y);
    if (leads) {
#pragma unroll
      for (int i = 0; i < K; ++i) {
        const A mean = from[i] + static_cast<A>(sums[1][i]) / static_cast<A>(sums[0][i]);
        if (is_finite(mean)) from[i] = mean;
      }
    }
    broadcast();
    // What every thread has, about that mean; in double, for it may be further from the shift than the values spread.
#pragma unroll
    for (int i = 0; i < K; ++i) {
      const double n = count_of_lane(i), distance = shift[i] - from[i], own = sum[i];
      sums[0][i] = own + n * distance;
      sums[1][i] = square[i] + distance * (own + sums[0][i]);
    }
    fold_rows(sums, scratch, t.threads_x, t.threads_y);
#pragma unroll
    for (int i = 0; i < K; ++i) {
      totals[0][i] = from[i];
      totals[1][i] = sums[0][i];
      totals[2][i] = sums[1][i];
    }
  }

  __device__ A count_of_lane(int i) const { return static_cast<A>(count + (kChannelsLast && i < tail)); }
};

// The partial sums of Q quantities: (Q, chunks, columns).
template <int Q, int K, typename A>
__device__ void write_partials(
    A* partials, const double (&totals)[Q][K], const Tiles& t, const Pass& pass, const BlockPlace& block) {
  if (thread_y(t) != 0) return;
  const int64_t first = (block.tile * t.threads_x + thread_x(t)) * K;
#pragma unroll
  for (int q = 0; q < Q; ++q) {
#pragma unroll
    for (int i = 0; i < K; ++i) {
      if (first + i < t.columns)
        partials[(q * pass.chunks + block.chunk) * t.columns + first + i] = static_cast<A>(totals[q][i]);
    }
  }
}

template <typename T>
struct StatisticsArguments {
  Tiles tiles;
  Pass pass;
  bool aligned;
  int norms;
  int first;  // norm that trains
  NormPointers<T> norm[2];
  Compute<T>* partials[2];  // of each norm that trains: a value, sums of x less that value and of its square
};

// Partial statistics of the norms that train, one after the other in the grid, and their counters.
template <typename T, bool kChannelsLast>
__global__ void __launch_bounds__(plan::kThreads, plan::kBlocks)
    statistics_kernel(const __grid_constant__ StatisticsArguments<T> a) {
  constexpr int K = kLanes<T, kChannelsLast>;
  if (blockIdx.x == 0 && threadIdx.x == 0) {
    for (int i = 0; i < a.norms; ++i) {
      if (a.norm[i].counter != nullptr) ++*a.norm[i].counter;
    }
  }
  const int64_t per_norm = a.tiles.tiles * a.pass.chunks;
  const int round = blockIdx.x >= per_norm ? 1 : 0;
  const bool second = a.first + round == 1;
  const BlockPlace block(a.tiles, a.pass, blockIdx.x - round * per_norm, false);
  const Walk<T, kChannelsLast> walk(a.tiles, block, a.pass.chunk, a.aligned);
  Deviations<T, kChannelsLast, false> deviations(second ? a.norm[1].x : a.norm[0].x, a.aligned, {});
  for_each_vector<plan::kForwardUnroll>(walk, deviations);
  double totals[3][K];
  auto* row = dynamic_shared_memory<double>();
  deviations.fold(totals, row + a.tiles.threads_x * K, row, a.tiles);
  write_partials(second ? a.partials[1] : a.partials[0], totals, a.tiles, a.pass, block);
}

// Elements of a column in a chunk.
__device__ inline int64_t count_of(
    const Tiles& t, const Pass& pass, bool channels_last, int64_t chunk, int64_t column) {
  const int64_t begin = chunk * pass.chunk;
  if (channels_last) {
    const int64_t end = min(begin + pass.chunk, t.rows);
    return end - begin - (end == t.rows && (end - 1) * t.row_length + column >= t.numel);
  }
  const auto before = [&](int64_t vector) {
    const int64_t row = vector / t.row_vectors;
    return row * t.area + min((vector - row * t.row_vectors) * t.vector, t.area);
  };
  return before(min(begin + pass.chunk, t.rows * t.row_vectors)) - before(begin);
}

template <typename T>
struct FinishStatisticsArguments {
  StatisticsArguments<T> statistics;
  bool channels_last;
};

// Merges the partial statistics of kFinishThreadsX channels per block, and writes statistics and running statistics.
// The norms follow each other on the same threads, for they may share their running statistics.
template <typename T>
__global__ void __launch_bounds__(kMaxFinishThreads)
    finish_statistics_kernel(const __grid_constant__ FinishStatisticsArguments<T> arguments) {
  const StatisticsArguments<T>& a = arguments.statistics;
  const Tiles& t = a.tiles;
  const int threads_y = static_cast<int>(blockDim.x) / kFinishThreadsX;
  const int64_t c = int64_t{blockIdx.x} * kFinishThreadsX + threadIdx.x % kFinishThreadsX;
  const int y = threadIdx.x / kFinishThreadsX;
  const int64_t per_channel = t.columns / t.channels;
  const int64_t plane = a.pass.chunks * t.columns;
  for (int n = 0; n < a.norms; ++n) {
    const NormPointers<T>& norm = a.norm[n];
    if (!norm.training) {
      if (c < t.channels && y == 0) running_statistics(norm, c).store(norm.stats, t.channels, c);
      continue;
    }
    // Sums about the first chunk's value, whose own distance from the mean is small beside double's precision.
    double sums[2][1] = {};
    double origin = 0;
    if (c < t.channels) {
      const Compute<T>* partials = a.partials[n];
      origin = partials[c];
#pragma unroll 4
      for (int64_t i = y; i < a.pass.chunks * per_channel; i += threads_y) {
        const int64_t chunk = per_channel == 1 ? i : i / per_channel;
        const int64_t column = c + (i - chunk * per_channel) * t.channels;
        const int64_t at = chunk * t.columns + column;
        const double count = static_cast<double>(count_of(t, a.pass, arguments.channels_last, chunk, column));
        const double from = partials[at], sum = partials[plane + at], square = partials[2 * plane + at];
        const double delta = from - origin;
        if (count > 0) {
          sums[0][0] += sum + count * delta;
          sums[1][0] += square + delta * (2 * sum + count * delta);
        }
      }
    }
    fold_rows(sums, dynamic_shared_memory<double>(), kFinishThreadsX, threads_y);
    if (c < t.channels && y == 0) {
      const double count = static_cast<double>(t.numel / t.channels);
      const double mean = sums[0][0] / count;
      const double var = sums[1][0] / count - mean * mean;
      finish_channel(norm, t, c, origin + mean, var < 0 ? 0 : var);
    }
  }
}

// The gradients of one norm's parameters, or null, and the numbers that dx needs besides its scale.
template <typename T>
struct GradientPointers {
  ChannelVector<T> dweight, dbias;
  Compute<T>* coefficients;  // (2, C), or null: dx = scale * g + of_x * (x - mean) + constant
  double* exchanged;         // or null: where the sums of g, of g * (x - mean) and the count go, (2C + 1)
};

template <typename A>
struct Coefficients {
  A of_x, constant;
};

// From sums of g and of g * (x - mean) over the `count` values of a channel.
template <typename T>
__device__ Coefficients<Compute<T>> gradient_coefficients(
    const NormPointers<T>& norm, int64_t channels, int64_t c, double count, double sum_g, double sum_gx) {
  using A = Compute<T>;
  const auto s = ChannelStatistics<A>::load(norm.stats, channels, c);
  const double mean_low = s.mean_low, rstd = s.rstd;
  const double per_count = 1.0 / count;
  const double scale = norm.weight.get(c, 1) * s.rstd;
  const double of_x = -scale * rstd * (sum_gx * rstd) * per_count;
  const double of_low = is_finite(of_x * mean_low) ? of_x * mean_low : 0;  // infinite times nothing would be NaN
  return {static_cast<A>(of_x), static_cast<A>(-scale * sum_g * per_count - of_low)};
}

// The same, with the mean in the precision of the saved one; writes the gradients of the parameters.
template <typename T>
__device__ Coefficients<Compute<T>> finish_gradients(
    const GradientPointers<T>& to,
    const NormPointers<T>& norm,
    const Tiles& t,
    int64_t c,
    double sum_g,
    double sum_gx) {
  const auto s = ChannelStatistics<Compute<T>>::load(norm.stats, t.channels, c);
  const double correction = static_cast<double>(s.mean_low) * sum_g;
  if (is_finite(correction)) sum_gx -= correction;
  const double count = static_cast<double>(t.numel / t.channels);
  if (to.dweight.data != nullptr) to.dweight.set(c, sum_gx * static_cast<double>(s.rstd));
  if (to.dbias.data != nullptr) to.dbias.set(c, sum_g);
  if (to.exchanged != nullptr) {
    to.exchanged[c] = sum_g;
    to.exchanged[t.channels + c] = sum_gx;
    if (c == 0) to.exchanged[2 * t.channels] = count;
  }
  return gradient_coefficients(norm, t.channels, c, count, sum_g, sum_gx);
}

template <typename T>
struct FinishGradientsArguments {
  Tiles tiles;
  int64_t chunks;
  int norms;
  const Compute<T>* partials;  // (1 + norms, chunks, columns): of g, and of g * (x - mean) for each norm
  NormPointers<T> norm[2];
  GradientPointers<T> to[2];
};

template <typename T>
__global__ void __launch_bounds__(kMaxFinishThreads)
    finish_gradients_kernel(const __grid_constant__ FinishGradientsArguments<T> a) {
  const Tiles& t = a.tiles;
  const int threads_y = static_cast<int>(blockDim.x) / kFinishThreadsX;
  const int64_t c = int64_t{blockIdx.x} * kFinishThreadsX + threadIdx.x % kFinishThreadsX;
  const int y = threadIdx.x / kFinishThreadsX;
  const int64_t per_channel = t.columns / t.channels;
  const int64_t plane = a.chunks * t.columns;
  double sums[3][1] = {};
  if (c < t.channels) {
#pragma unroll 4
    for (int64_t i = y; i < a.chunks * per_channel; i += threads_y) {
      const int64_t chunk = per_channel == 1 ? i : i / per_channel;
      const int64_t at = chunk * t.columns + c + (i - chunk * per_channel) * t.channels;
      sums[0][0] += a.partials[at];
      sums[1][0] += a.partials[plane + at];
      if (a.norms == 2) sums[2][0] += a.partials[2 * plane + at];
    }
  }
  fold_rows(sums, dynamic_shared_memory<double>(), kFinishThreadsX, threads_y);
  if (c >= t.channels || y != 0) return;
#pragma unroll
  for (int n = 0; n < 2; ++n) {
    if (n == a.norms) return;
    const auto coefficients = finish_gradients(a.to[n], a.norm[n], t, c, sums[0][0], sums[1 + n][0]);
    if (a.to[n].coefficients != nullptr) {
      a.to[n].coefficients[c] = coefficients.of_x;
      a.to[n].coefficients[t.channels + c] = coefficients.constant;
    }
  }
}

}  // namespace fusedres
