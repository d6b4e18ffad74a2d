// One batch normalisation on the driver's side: where its tiles are, its statistics, and the numbers that the kernels
// take per channel. Shared by the families that contain a normalisation.
#pragma once

#include <cmath>
#include <numeric>
#include <vector>

#include "batch_norm_kernels.h"
#include "common/batch_norm.h"
#include "driver.h"

namespace fusedres::cpu {

template <class T>
const BatchNormKernels<T>& batch_norm_kernels() {
  FUSEDRES_RETURN_FOR_THIS_CPU(batch_norm_kernels<T>());
}

// Up to this size sums are in double: cancellation in a few values is not averaged out, and the time is not noticed.
constexpr int64_t kDoubleElements = 8 * 1024;

// How a tensor is cut. The blocks over which sums run depend on the shape alone, so that the bits of a result do not
// depend on the number of threads.
struct Tiling {
  Layout4d layout;
  Rows rows{};           // channels_last
  Planes planes{};       // contiguous
  int64_t columns;       // per-column sums and parameters: rows.width, or the channels
  int64_t height;        // rows (a partial one included), or the batch
  int64_t block_height;  // of the blocks that are summed separately
  int64_t blocks;
  // A small tensor is summed in double: so few roundings do not average out, and eager may be lucky with them.
  bool sums_in_double;

  explicit Tiling(const Layout4d& layout_) : layout(layout_) {
    STD_TORCH_CHECK(layout.numel() > 0, "x must not be empty");
    const int64_t channels = layout.channels;
    if (layout.channels_last) {
      const int64_t repeat = kLanes / std::gcd(channels, int64_t{kLanes});
      rows.width = channels * repeat;
      rows.count = layout.numel() / rows.width;
      rows.tail = layout.numel() % rows.width;
      columns = rows.width;
      height = rows.count + (rows.tail > 0);
      block_height = std::max<int64_t>(1024, ceil_div(ceil_div(height, 64), 8) * 8);
    } else {
      planes = {channels, layout.area()};
      columns = channels;
      height = layout.batch;
      block_height = channels >= 64 ? height : ceil_div(height, std::min<int64_t>(height, 8));
    }
    blocks = ceil_div(height, block_height);
    sums_in_double = layout.numel() <= kDoubleElements;
  }

  // Values of column c in a block.
  double count(int64_t block, int64_t c) const {
    const int64_t begin = block * block_height;
    const int64_t end = std::min(begin + block_height, height);
    if (!layout.channels_last) return static_cast<double>((end - begin) * layout.area());
    return static_cast<double>(end - begin - (end > rows.count && c >= rows.tail ? 1 : 0));
  }

  Range block_range(int64_t block, int64_t c0, int64_t c1) const {
    return {block * block_height, std::min((block + 1) * block_height, height), c0, c1};
  }

  // Contiguous: the channels of a task that reduces and then applies, while its planes are still in the second-level
  // cache; neighbouring planes are adjacent, so at least a page of them. channels_last: 0, for a block of columns is a
  // walk in strides, which costs more than the cache brings.
  int64_t cached_channels(int64_t bytes_per_value) const {
    if (layout.channels_last) return 0;
    return std::min(std::max<int64_t>(1, ceil_div(4096, layout.area() * bytes_per_value)), columns);
  }
};

// Columns [c0, c1) of task `task` when `columns` are cut into pieces of `width`.
inline std::pair<int64_t, int64_t> columns_of(int64_t task, int64_t width, int64_t columns) {
  return {task * width, std::min((task + 1) * width, columns)};
}

// Work per channel goes through doubles, so many channels at a time.
constexpr int64_t kChannelChunk = 256;

template <class F>
void for_each_chunk(int64_t c0, int64_t c1, const F& f) {
  for (int64_t c = c0; c < c1; c += kChannelChunk) f(c, std::min(c + kChannelChunk, c1));
}

inline void read_or_fill(const ChannelVector& v, int64_t c0, int64_t c1, double otherwise, double* to) {
  if (v) {
    v.read(c0, c1, to);
  } else {
    std::fill(to, to + (c1 - c0), otherwise);
  }
}

enum class Which { first, second };  // of a pair; a lone normalisation is the first
enum class Direction { forward, backward };

// The table of what the kernels take per column (see Slots), filled by one normalisation or by the two of a pair, the
// first before the second.
template <class T>
class ParamTable {
 public:
  using S = typename ScalarOf<T>::type;

  static size_t bytes(const Tiling& tiling, bool pair, Direction direction) {
    return sizeof(S) * count_slots(pair, direction) * padded(tiling.columns);
  }
  ParamTable(Scratch& scratch, const Tiling& tiling, bool pair, Direction direction)
      : pair_(pair),
        slots_(count_slots(pair, direction)),
        channels_(tiling.layout.channels),
        columns_(tiling.columns),
        data_(scratch.take<S>(slots_ * padded(tiling.columns))) {}

  const S* data() const { return data_; }

  // y of channels [c0, c1), at most kChannelChunk, from the saved statistics (3, C).
  void write_affine(
      Which which, const S* stats, const ChannelVector& weight, const ChannelVector& bias, int64_t c0, int64_t c1) {
    double w[kChannelChunk], b[kChannelChunk];
    S scale[kChannelChunk], shift[kChannelChunk];
    read_or_fill(weight, c0, c1, 1.0, w);
    read_or_fill(bias, c0, c1, 0.0, b);
    for (int64_t i = 0; i < c1 - c0; ++i) {
      scale[i] = static_cast<S>(w[i] * static_cast<double>(stats[channels_ + c0 + i]));
      const double mean_low = stats[2 * channels_ + c0 + i];
      shift[i] = static_cast<S>(b[i] - mean_low * static_cast<double>(scale[i]));
    }
    const bool first = which == Which::first;
    const auto set = [](S& to, S from) { to = from; };
    for_each_column(first ? Slot::mean : Slot::mean2, c0, c1, stats + c0, set);
    for_each_column(first ? Slot::scale : Slot::scale2, c0, c1, scale, set);
    if (first) return for_each_column(Slot::shift, c0, c1, shift, set);
    for_each_column(Slot::shift, c0, c1, shift, [](S& to, S from) { to += from; });
  }

  // dx of channels [c0, c1).
  void write_gradient(Which which, const S* of_x, const S* constant, int64_t c0, int64_t c1) {
    const int slot = !pair_ ? Slots<false>::of_x : which == Which::first ? Slot::of_x : Slot::of_x2;
    const auto set = [](S& to, S from) { to = from; };
    for_each_column(slot, c0, c1, of_x, set);
    for_each_column(slot + 1, c0, c1, constant, set);
  }

  S scale(Which which, int64_t c) { return at(which == Which::first ? Slot::scale : Slot::scale2, c); }

 private:
  using Slot = Slots<true>;
  static_assert(Slot::constant == Slot::of_x + 1 && Slot::constant2 == Slot::of_x2 + 1);

  static int count_slots(bool pair, Direction direction) {
    if (direction == Direction::forward) return pair ? Slots<true>::forward : Slots<false>::forward;
    return pair ? Slots<true>::backward : Slots<false>::backward;
  }
  static int64_t padded(int64_t columns) { return ceil_div(columns, kLanes) * kLanes; }

  S& at(int slot, int64_t column) { return data_[(column / kLanes * slots_ + slot) * kLanes + column % kLanes]; }

  // A channel has several columns where the tensor is walked in rows longer than its channels.
  template <class F>
  void for_each_column(int slot, int64_t c0, int64_t c1, const S* from, const F& f) {
    for (int64_t first = 0; first < columns_; first += channels_) {
      for (int64_t c = c0; c < c1; ++c) f(at(slot, first + c), from[c - c0]);
    }
  }

  bool pair_;
  int slots_;
  int64_t channels_, columns_;
  S* data_;
};

// The values of one channel, taken together part by part (Chan, Golub and LeVeque 1979).
class Moments {
 public:
  void add(double count, double mean, double m2) {
    if (count == 0.0) return;
    sum_ += mean * count;
    if (count_ == 0.0) {
      count_ = count;
      mean_ = mean;
      m2_ = m2;
      return;
    }
    const double delta = mean - mean_;
    count_ += count;
    mean_ += delta * (count / count_);
    m2_ += m2 + delta * delta * (count * (count_ - count) / count_);
  }
  void add(const Moments& other) {
    const double sum = sum_ + other.sum_;
    add(other.count_, other.mean_, other.m2_);
    sum_ = sum;
  }
  // With Inf among the values, deviations from an infinite mean are NaN, but the mean itself is not.
  double mean() const { return std::isfinite(mean_) ? mean_ : sum_ / count_; }
  double m2() const { return m2_; }

 private:
  double count_ = 0.0, mean_ = 0.0, m2_ = 0.0, sum_ = 0.0;
};

// The partial statistics of a tensor, of the op of this name.
Tensor batch_norm_statistics_cpu(Tensor x);

// Channel c of the statistics per block and column.
inline Moments merge_blocks(const Tiling& tiling, const double* mean, const double* m2, int64_t c) {
  Moments merged;
  for (int64_t block = 0; block < tiling.blocks; ++block) {
    for (int64_t column = c; column < tiling.columns; column += tiling.layout.channels) {
      const int64_t i = block * tiling.columns + column;
      merged.add(tiling.count(block, column), mean[i], m2[i]);
    }
  }
  return merged;
}

// Moves the running statistics of channels [c0, c1), at most kChannelChunk, towards the mean and variance of a batch.
inline void move_running(
    const ChannelVector& running_mean,
    const ChannelVector& running_var,
    double momentum,
    double count,
    int64_t c0,
    int64_t c1,
    const double* mean,
    const double* var) {
  double running[kChannelChunk];
  running_mean.read(c0, c1, running);
  for (int64_t i = 0; i < c1 - c0; ++i) running[i] = (1.0 - momentum) * running[i] + momentum * mean[i];
  running_mean.write(c0, c1, running);
  running_var.read(c0, c1, running);
  const double unbiased = count / (count - 1.0);
  for (int64_t i = 0; i < c1 - c0; ++i) running[i] = (1.0 - momentum) * running[i] + momentum * (var[i] * unbiased);
  running_var.write(c0, c1, running);
}

// To the saved statistics (3, C): mean, rstd and the part of the mean below their resolution.
template <class S>
void save_statistics(
    S* stats, int64_t channels, double eps, int64_t c0, int64_t c1, const double* mean, const double* var) {
  for (int64_t c = c0; c < c1; ++c) {
    const double m = mean[c - c0];
    stats[c] = static_cast<S>(m);
    stats[channels + c] = static_cast<S>(1.0 / std::sqrt(var[c - c0] + eps));
    // Zero where the mean is not finite: Inf - Inf would turn an infinite mean into NaN.
    stats[2 * channels + c] = std::isfinite(m) ? static_cast<S>(m - static_cast<double>(stats[c])) : S(0);
  }
}

// The forward side of one normalisation: statistics of x, running statistics, saved statistics, column parameters.
template <class T>
class Norm {
 public:
  using S = typename ScalarOf<T>::type;

  static size_t scratch_bytes(const Tiling& tiling) { return 2 * sizeof(double) * tiling.columns * tiling.blocks; }

  Norm(
      const NormArguments& a,
      const T* x,
      const Tiling& tiling,
      const Tensor& stats,
      ParamTable<T>& params,
      Scratch& scratch,
      Which which = Which::first)
      : training(a.training),
        x_(x),
        tiling_(tiling),
        eps_(a.eps),
        params_(params),
        which_(which),
        mean_(scratch.take<double>(training ? tiling.columns * tiling.blocks : 0)),
        m2_(scratch.take<double>(training ? tiling.columns * tiling.blocks : 0)),
        stats_(data<S>(stats)),
        weight_(a.weight),
        bias_(a.bias),
        running_mean_(a.running_mean),
        running_var_(a.running_var),
        counter_(
            a.num_batches_tracked && training ? static_cast<int64_t*>(a.num_batches_tracked->data_ptr()) : nullptr),
        momentum_(
            a.momentum ? *a.momentum
            : counter_ ? 1.0 / static_cast<double>(*counter_ + 1)
                       : 0.0) {
    if (counter_) ++*counter_;
  }

  const bool training;

  // Partial statistics of a block, columns [c0, c1).
  void block_statistics(int64_t block, int64_t c0, int64_t c1) const {
    const auto& kernels = batch_norm_kernels<T>();
    const Range range = tiling_.block_range(block, c0, c1);
    double* mean = mean_ + block * tiling_.columns;
    double* m2 = m2_ + block * tiling_.columns;
    if (tiling_.layout.channels_last) {
      kernels.statistics_rows(x_, tiling_.rows, range, tiling_.sums_in_double, mean, m2);
    } else {
      kernels.statistics_planes(x_, tiling_.planes, range, tiling_.sums_in_double, mean, m2);
    }
  }

  // Merges the blocks' statistics (Chan, Golub and LeVeque 1979) and moves the running ones, for channels [c0, c1).
  void finish(int64_t c0, int64_t c1) {
    for_each_chunk(c0, c1, [&](int64_t begin, int64_t end) {
      double mean[kChannelChunk], var[kChannelChunk];
      if (training) {
        merge(begin, end, mean, var);
      } else {
        running_mean_.read(begin, end, mean);
        running_var_.read(begin, end, var);
      }
      save_statistics(stats_, tiling_.layout.channels, eps_, begin, end, mean, var);
      params_.write_affine(which_, stats_, weight_, bias_, begin, end);
    });
  }

 private:
  // Mean and biased variance of channels [c0, c1), at most kChannelChunk; moves their running statistics.
  void merge(int64_t c0, int64_t c1, double* mean, double* var) {
    const double count = static_cast<double>(tiling_.layout.pixels());
    for (int64_t c = c0; c < c1; ++c) {
      const Moments merged = merge_blocks(tiling_, mean_, m2_, c);
      mean[c - c0] = merged.mean();
      var[c - c0] = merged.m2() / count;
    }
    if (running_mean_) move_running(running_mean_, running_var_, momentum_, count, c0, c1, mean, var);
  }

  const T* x_;
  const Tiling& tiling_;
  double eps_;
  ParamTable<T>& params_;
  Which which_;
  double* mean_;
  double* m2_;
  S* stats_;
  ChannelVector weight_, bias_, running_mean_, running_var_;
  int64_t* counter_;
  double momentum_;
};

// Runs f(block, c0, c1) for every block of rows; where they are too few for the threads, each in pieces of the columns.
template <class F>
void for_each_block(const Tiling& tiling, const F& f) {
  const int64_t most = 2 * threads();
  const int64_t pieces = tiling.blocks >= most ? 1 : std::min(most, ceil_div(tiling.columns, 64));
  const int64_t width = ceil_div(ceil_div(tiling.columns, pieces), kLanes) * kLanes;
  const int64_t used = ceil_div(tiling.columns, width);
  for_each_task(tiling.blocks * used, tiling.layout.numel(), [&](int64_t task) {
    const auto [c0, c1] = columns_of(task % used, width, tiling.columns);
    f(task / used, c0, c1);
  });
}

// Pieces of an element-wise pass, walked from the end: what the pass before it touched last is still cached.
template <class F>
void for_each_piece_backwards(const Tiling& tiling, const F& f) {
  const int64_t height_elements = tiling.layout.numel() / tiling.height + 1;
  const int64_t piece = std::max<int64_t>(1, ceil_div(ceil_div(32 * 1024, height_elements), 8) * 8);
  const int64_t tasks = ceil_div(tiling.height, piece);
  for_each_task(tasks, tiling.layout.numel(), [&](int64_t task) {
    const int64_t begin = (tasks - 1 - task) * piece;
    f(Range{begin, std::min(begin + piece, tiling.height), 0, tiling.columns});
  });
}

// The statistics of the normalisations that train, then `finish` of all.
template <class T>
void all_statistics(const Tiling& tiling, Norm<T>* const* norms, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    Norm<T>& norm = *norms[i];
    if (norm.training) {
      for_each_block(tiling, [&](int64_t block, int64_t c0, int64_t c1) { norm.block_statistics(block, c0, c1); });
    }
    norm.finish(0, tiling.layout.channels);
  }
}

// The coefficients of dx of channels [c0, c1), at most kChannelChunk, from the sums of g and of g*(x - mean) over the
// `count` values of a channel.
template <class T, class S>
void write_gradient(
    ParamTable<T>& params,
    Which which,
    const S* stats,
    int64_t channels,
    bool training,
    double count,
    int64_t c0,
    int64_t c1,
    const double* g,
    const double* gx) {
  const double per_count = 1.0 / count;
  S of_x[kChannelChunk], constant[kChannelChunk];
  for (int64_t c = c0; c < c1; ++c) {
    const double rstd = stats[channels + c];
    const double mean_low = stats[2 * channels + c];
    const double scale = params.scale(which, c);
    // In evaluation exactly zero, whatever the sums are.
    const double by_x = training ? -scale * rstd * (gx[c - c0] * rstd) * per_count : 0.0;
    // An infinite gradient times nothing would be NaN.
    const double of_low = std::isfinite(by_x * mean_low) ? by_x * mean_low : 0.0;
    of_x[c - c0] = static_cast<S>(by_x);
    constant[c - c0] = static_cast<S>(training ? -scale * g[c - c0] * per_count - of_low : 0.0);
  }
  params.write_gradient(which, of_x, constant, c0, c1);
}

// The backward side of one normalisation: from sums of g and g*(x - mean) to dweight, dbias and the coefficients of dx.
template <class T>
class NormBackward {
 public:
  using S = typename ScalarOf<T>::type;

  static size_t scratch_bytes(const Tiling& tiling) { return sizeof(double) * tiling.columns * tiling.blocks; }

  NormBackward(
      const Tensor& stats,
      const OptionalTensor& weight,
      const OptionalTensor& bias,
      bool training,
      const Tiling& tiling,
      const OptionalTensor& dweight,
      const OptionalTensor& dbias,
      ParamTable<T>& params,
      Scratch& scratch,
      Which which = Which::first)
      : training(training),
        tiling_(tiling),
        stats_(data<S>(stats)),
        dweight_(dweight),
        dbias_(dbias),
        params_(params),
        which_(which),
        sum_(scratch.take<double>(tiling.columns * tiling.blocks)) {
    const ChannelVector weights(weight), biases(bias);
    for_each_chunk(0, tiling.layout.channels, [&](int64_t begin, int64_t end) {
      params.write_affine(which, stats_, weights, biases, begin, end);
    });
  }

  const bool training;

  // Per block and column: the sum of g*(x - mean).
  double* sum(int64_t block) const { return sum_ + block * tiling_.columns; }

  // Sums of g and of g*(x - mean) of channels [c0, c1), at most kChannelChunk, from those per block and column.
  void totals(const double* sum_g, int64_t c0, int64_t c1, double* g, double* gx) const {
    const int64_t channels = tiling_.layout.channels;
    std::fill(g, g + (c1 - c0), 0.0);
    std::fill(gx, gx + (c1 - c0), 0.0);
    for (int64_t block = 0; block < tiling_.blocks; ++block) {
      for (int64_t first = 0; first < tiling_.columns; first += channels) {
        const int64_t at = block * tiling_.columns + first;
        for (int64_t c = c0; c < c1; ++c) {
          g[c - c0] += sum_g[at + c];
          gx[c - c0] += sum_[at + c];
        }
      }
    }
    for (int64_t c = c0; c < c1; ++c) {
      const double correction = static_cast<double>(stats_[2 * channels + c]) * g[c - c0];
      if (std::isfinite(correction)) gx[c - c0] -= correction;
    }
  }

  // dweight and dbias of channels [c0, c1), at most kChannelChunk, where they are wanted.
  void write_parameter_gradients(int64_t c0, int64_t c1, const double* g, const double* gx) const {
    if (dbias_) dbias_.write(c0, c1, g);
    if (!dweight_) return;
    double dweight[kChannelChunk];
    const S* rstd = stats_ + tiling_.layout.channels;
    for (int64_t c = c0; c < c1; ++c) dweight[c - c0] = gx[c - c0] * static_cast<double>(rstd[c]);
    dweight_.write(c0, c1, dweight);
  }

  // With sum_g per block and column, for channels [c0, c1); `reduced` says whether the sums were taken at all.
  void finish(const double* sum_g, bool reduced, int64_t c0, int64_t c1) {
    const double count = static_cast<double>(tiling_.layout.pixels());
    for_each_chunk(c0, c1, [&](int64_t begin, int64_t end) {
      double g[kChannelChunk] = {}, gx[kChannelChunk] = {};
      if (reduced) {
        totals(sum_g, begin, end, g, gx);
        write_parameter_gradients(begin, end, g, gx);
      }
      write_gradient(params_, which_, stats_, tiling_.layout.channels, training, count, begin, end, g, gx);
    });
  }

 private:
  const Tiling& tiling_;
  const S* stats_;
  ChannelVector dweight_, dbias_;
  ParamTable<T>& params_;
  Which which_;
  double* sum_;
};

}  // namespace fusedres::cpu
