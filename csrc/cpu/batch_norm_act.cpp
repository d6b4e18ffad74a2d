// Batch normalisation, residual addition and ReLU on a CPU. Compiled once per instruction set for the kernels
// (FUSEDRES_ISA) and once, without it, for the drivers and their registration with torch.
#include "batch_norm_kernels.h"

#if defined(FUSEDRES_ISA)

#include <limits>
#include <type_traits>

#include "traverse.h"

namespace fusedres::cpu {
namespace {

// What sums are kept in.
template <class T, bool kInDouble>
using Sums = std::conditional_t<kInDouble, Compute<double>, Compute<T>>;

// Calls f with a constant, whether sums are to be in double; for doubles they are in any case.
template <class T, class F>
FUSEDRES_INLINE void with_sums(bool in_double, const F& f) {
  if (in_double && !std::is_same_v<T, double>) {
    f(std::bool_constant<!std::is_same_v<T, double>>());
  } else {
    f(std::false_type());
  }
}

template <class To, class From>
FUSEDRES_INLINE To widened(From v) {
  if constexpr (std::is_same_v<To, From>) {
    return v;
  } else {
    return to_double(v);
  }
}

// ---- statistics ----

// Sums of x - shift and of its square. The shift is the mean of a few samples of the range itself, which bounds the
// cancellation in m2 = q - s*s/n whatever the data: (shift - mean)^2 is at most a fraction of m2. It has few
// significant bits where the data allow it: x - shift, and for 16-bit x often its sums, are then exact.
template <class T, bool kInDouble>
struct Deviations {
  using Scalar = typename Sums<T, kInDouble>::Scalar;
  using Vec = typename Sums<T, kInDouble>::Vec;
  static constexpr int kSlots = 1;
  static constexpr int kSums = 2;
  static constexpr int64_t kTile = 16;        // short: eager's sums are in double, and so nearly exact
  const typename Compute<T>::Scalar* params;  // the shift
  const T* x;

  template <bool kFull, class P>
  FUSEDRES_INLINE void accumulate(const P& p, Vec* s, int64_t i, int64_t, int n) const {
    Vec d = widened<Vec>(get<kFull>(x + i, n)) - widened<Vec>(p[0]);
    if constexpr (!kFull) d = keep(first_lanes(n, d), d);
    s[0] = s[0] + d;
    s[1] = fma(d, d, s[1]);
  }
};

constexpr int64_t kSamples = 8;

// The mean of samples that lie within `range` of one another, rounded to about a sixteenth of that, a power of two.
template <class V>
FUSEDRES_INLINE V coarse(V mean, V range, const V factor) {
  const V magic = range * factor;
  return (mean + magic) - magic;
}
template <class S>
constexpr S kCoarse = S(0.0625) * S(1.5) / std::numeric_limits<S>::epsilon();

template <class T>
FUSEDRES_INLINE double scalar(const T* p) {
  return static_cast<double>([&] {
    typename Compute<T>::Scalar lanes[kLanes];
    store(lanes, load_n(p, 1));
    return lanes[0];
  }());
}

// From sums about a shift to mean and m2; where the compute type overflowed (|x| above 1e19), again in double.
template <class Scalar, class AgainInDouble>
FUSEDRES_INLINE void finish_statistics(
    int64_t c, double count, Scalar shift, double& mean, double& m2, const AgainInDouble& again_in_double) {
  const double s = mean, q = m2;
  if (count == 0) {
    mean = m2 = 0.0;
  } else if (std::isfinite(q)) {
    mean = static_cast<double>(shift) + s / count;
    const double v = q - s * s / count;
    m2 = v < 0.0 ? 0.0 : v;
  } else {
    again_in_double(c);
  }
}

template <class T>
void statistics_rows(const T* x, const Rows& rows, const Range& range, bool in_double, double* mean, double* m2) {
  using Scalar = typename Compute<T>::Scalar;
  using Vec = typename Compute<T>::Vec;
  alignas(64) Scalar shift[kColumnChunk];
  const int64_t height = range.end - range.begin;
  for (int64_t chunk = range.c0; chunk < range.c1; chunk += kColumnChunk) {
    const int64_t end = chunk + kColumnChunk < range.c1 ? chunk + kColumnChunk : range.c1;
    // The last, partial row gives no samples, unless it is all there is.
    const int64_t full = (range.end < rows.count ? range.end : rows.count) - range.begin;
    const int64_t samples = full < kSamples ? full : kSamples;
    std::memset(shift, 0, sizeof shift);
    for (int64_t c = chunk; samples == 0 && c < end && c < rows.tail; ++c) {
      shift[c - chunk] = static_cast<Scalar>(scalar(x + range.begin * rows.width + c));
    }
    const auto weight = broadcast(Scalar(1) / static_cast<Scalar>(samples));
    for (int64_t c = chunk; samples > 0 && c < end; c += kLanes) {
      const auto sample = [&](int64_t k) { return load(x + (range.begin + k * full / samples) * rows.width + c); };
      Vec sum = broadcast(Scalar(0)), low = sample(0), high = low;
      for (int64_t k = 0; k < samples; ++k) {
        const Vec v = sample(k);
        sum = fma(v, weight, sum);
        low = blend(greater_or_nan(low, v), v, low);
        high = blend(greater_or_nan(v, high), v, high);
      }
      store(shift + c - chunk, coarse(sum, high - low, broadcast(kCoarse<Scalar>)));
    }
    for (int64_t c = chunk; c < end; ++c) {
      // A shift that is not finite would spoil sums that are.
      if (!std::isfinite(static_cast<double>(shift[c - chunk]))) shift[c - chunk] = 0;
      mean[c] = m2[c] = 0.0;
    }
    double* const sums[] = {mean, m2};
    with_sums<T>(in_double, [&]<bool kInDouble>(std::bool_constant<kInDouble>) {
      constexpr int kRows = kInDouble ? 1 : 2 * kTogether<Scalar>;
      reduce_rows<kRows>(Deviations<T, kInDouble>{shift - chunk, x}, rows, range.begin, range.end, chunk, end, sums);
    });
    for (int64_t c = chunk; c < end; ++c) {
      const bool in_tail = range.end > rows.count && c >= rows.tail;
      const double count = static_cast<double>(height - (in_tail ? 1 : 0));
      finish_statistics(c, count, shift[c - chunk], mean[c], m2[c], [&](int64_t column) {
        const int64_t last = in_tail ? range.end - 1 : range.end;
        double s = 0.0, q = 0.0;
        for (int64_t r = range.begin; r < last; ++r) s += scalar(x + r * rows.width + column);
        mean[column] = s / count;
        for (int64_t r = range.begin; r < last; ++r) {
          const double d = scalar(x + r * rows.width + column) - mean[column];
          q += d * d;
        }
        m2[column] = q;
      });
    }
  }
}

template <class T>
void statistics_planes(const T* x, const Planes& planes, const Range& range, bool in_double, double* mean, double* m2) {
  using Scalar = typename Compute<T>::Scalar;
  Scalar shift[kPlaneGroup];
  const int64_t height = range.end - range.begin;
  const int64_t count = height * planes.area;
  for (int64_t group = range.c0; group < range.c1; group += kPlaneGroup) {
    const int64_t end = group + kPlaneGroup < range.c1 ? group + kPlaneGroup : range.c1;
    const auto at = [&](int64_t c, int64_t k) {
      return x + ((range.begin + k / planes.area) * planes.channels + c) * planes.area + k % planes.area;
    };
    const int64_t samples = count < kSamples ? count : kSamples;
    for (int64_t c = group; c < end; ++c) {
      double sum = 0.0, low = scalar(at(c, 0)), high = low;
      for (int64_t k = 0; k < samples; ++k) {
        const double v = scalar(at(c, k * count / samples));
        sum += v;
        low = v < low ? v : low;
        high = v > high ? v : high;
      }
      const Scalar sample_mean = static_cast<Scalar>(sum / static_cast<double>(samples));
      shift[c - group] = coarse(sample_mean, static_cast<Scalar>(high - low), kCoarse<Scalar>);
      if (!std::isfinite(static_cast<double>(shift[c - group]))) shift[c - group] = 0;
      mean[c] = m2[c] = 0.0;
    }
    double* const sums[] = {mean, m2};
    with_sums<T>(in_double, [&]<bool kInDouble>(std::bool_constant<kInDouble>) {
      reduce_planes(Deviations<T, kInDouble>{shift - group, x}, planes, range.begin, range.end, group, end, sums);
    });
    for (int64_t c = group; c < end; ++c) {
      finish_statistics(c, static_cast<double>(count), shift[c - group], mean[c], m2[c], [&](int64_t channel) {
        double s = 0.0, q = 0.0;
        for (int64_t k = 0; k < count; ++k) s += scalar(at(channel, k));
        mean[channel] = s / static_cast<double>(count);
        for (int64_t k = 0; k < count; ++k) {
          const double d = scalar(at(channel, k)) - mean[channel];
          q += d * d;
        }
        m2[channel] = q;
      });
    }
  }
}

// ---- forward ----

enum class Addend { none, residual, normalised };

template <class T, Addend kAddend, bool kRelu, bool kMask, bool kStream>
struct Forward {
  using Scalar = typename Compute<T>::Scalar;
  using Vec = typename Compute<T>::Vec;
  using Slot = Slots<kAddend == Addend::normalised>;
  using Element = T;
  static constexpr int kSlots = Slot::forward;
  static constexpr int kOutputs = 1;
  static constexpr bool kStreams = kStream;
  const ForwardArgs<T> a;
  const Scalar* params = a.params;
  const Outputs<T, 1> outputs{a.out};

  template <bool kFull, class P>
  FUSEDRES_INLINE Values<Vec, 1> map(const P& p, int64_t i, int64_t word, int n) const {
    Vec y = p[Slot::shift];
    if constexpr (kAddend == Addend::normalised) y = fma(get<kFull>(a.x2 + i, n) - p[Slot::mean2], p[Slot::scale2], y);
    y = fma(get<kFull>(a.x + i, n) - p[Slot::mean], p[Slot::scale], y);
    if constexpr (kAddend == Addend::residual) y = y + get<kFull>(a.residual + i, n);
    if constexpr (kRelu) {
      const auto m = positive<T>(y);
      y = keep(m, y);
      if constexpr (kMask) a.mask[word] = kFull ? bits(m) : bits(m) & ((1u << n) - 1);
    }
    return {y};
  }
};

template <class T, bool kStream, class F>
FUSEDRES_INLINE void with_forward(const ForwardArgs<T>& a, const F& f) {
  if (a.x2) {
    return a.relu ? f(Forward<T, Addend::normalised, true, false, kStream>{a})
                  : f(Forward<T, Addend::normalised, false, false, kStream>{a});
  }
  if (a.residual) {
    if (!a.relu) return f(Forward<T, Addend::residual, false, false, kStream>{a});
    return a.mask ? f(Forward<T, Addend::residual, true, true, kStream>{a})
                  : f(Forward<T, Addend::residual, true, false, kStream>{a});
  }
  return a.relu ? f(Forward<T, Addend::none, true, false, kStream>{a})
                : f(Forward<T, Addend::none, false, false, kStream>{a});
}

template <class T>
void forward_rows(const ForwardArgs<T>& a, const Rows& rows, const Range& r) {
  const auto walk = [&](const auto& body) { map_rows(body, rows, r.begin, r.end, r.c0, r.c1); };
  if (kHasStreams && a.stream) return with_forward<T, kHasStreams>(a, walk), finish_streams(true);
  with_forward<T, false>(a, walk);
}

template <class T>
void forward_planes(const ForwardArgs<T>& a, const Planes& planes, const Range& r) {
  with_forward<T, false>(a, [&](const auto& body) { map_planes(body, planes, r.begin, r.end, r.c0, r.c1); });
}

// ---- backward ----

// One vector of the inputs of a backward pass: the gradient that reaches the normalisation, which is dy where the ReLU
// was open, and the centred x.
template <class T, bool kPair, bool kFull>
struct Incoming {
  using Vec = typename Compute<T>::Vec;
  using Slot = Slots<kPair>;
  Vec centred, centred2, g;

  template <class P>
  FUSEDRES_INLINE Incoming(ReluMask relu, const BackwardArgs<T>& a, const P& p, int64_t i, int64_t word, int n) {
    centred = centred2 = get<kFull>(a.x + i, n) - p[Slot::mean];
    if constexpr (kPair) centred2 = get<kFull>(a.x2 + i, n) - p[Slot::mean2];
    g = get<kFull>(a.dy + i, n);  // lanes past the end are zero and add nothing
    if (relu == ReluMask::stored) {
      g = keep(mask_from_bits(a.mask[word], g), g);
    } else if (relu == ReluMask::recomputed) {
      Vec y = p[Slot::shift];
      if constexpr (kPair) y = fma(centred2, p[Slot::scale2], y);
      g = keep(positive<T>(fma(centred, p[Slot::scale], y)), g);
    }
  }
};

// In double, which is for small tensors, one body serves every kRelu.
template <class T, ReluMask kRelu, bool kPair, bool kInDouble = false>
struct Reduce {
  using Scalar = typename Sums<T, kInDouble>::Scalar;
  using Vec = typename Sums<T, kInDouble>::Vec;
  using Slot = Slots<kPair>;
  static constexpr int kSlots = Slots<kPair>::backward;
  static constexpr int kSums = kPair ? 3 : 2;
  static constexpr int64_t kTile = kTogether<Scalar> > 1 ? 64 : 16;  // chains of 16 roundings
  const BackwardArgs<T> a;
  const typename Compute<T>::Scalar* params = a.params;

  template <bool kFull, class P>
  FUSEDRES_INLINE void accumulate(const P& p, Vec* s, int64_t i, int64_t word, int n) const {
    const Incoming<T, kPair, kFull> in(kInDouble ? a.relu : kRelu, a, p, i, word, n);
    const Vec g = widened<Vec>(in.g);
    const auto centred = [&](const T* x, int mean) {
      return widened<Vec>(get<kFull>(x + i, n)) - widened<Vec>(p[mean]);
    };
    s[0] = s[0] + g;
    s[1] = fma(g, centred(a.x, Slot::mean), s[1]);
    if constexpr (kPair) s[2] = fma(g, centred(a.x2, Slot::mean2), s[2]);
  }
};

// kUsesX: false in evaluation, where dx = g * scale whatever x is; it is then not read, unless for the mask.
template <class T, ReluMask kRelu, bool kPair, bool kUsesX, bool kStream>
struct Backward {
  using Scalar = typename Compute<T>::Scalar;
  using Vec = typename Compute<T>::Vec;
  using Slot = Slots<kPair>;
  using Element = T;
  static constexpr int kSlots = Slot::backward;
  static constexpr int kOutputs = 2;
  static constexpr bool kStreams = kStream;
  const BackwardArgs<T> a;
  const Scalar* params = a.params;
  const Outputs<T, 2> outputs{a.dx, kPair ? a.dx2 : a.dresidual};

  static FUSEDRES_INLINE Vec gradient(bool uses_x, Vec g, Vec scale, Vec of_x, Vec centred, Vec constant) {
    if (kUsesX && (!kPair || uses_x)) return fma(scale, g, fma(of_x, centred, constant));
    return scale * g;
  }
  template <bool kFull, class P>
  FUSEDRES_INLINE Values<Vec, 2> map(const P& p, int64_t i, int64_t word, int n) const {
    const Incoming<T, kPair, kFull> in(kRelu, a, p, i, word, n);
    const Vec dx = gradient(a.uses_x, in.g, p[Slot::scale], p[Slot::of_x], in.centred, p[Slot::constant]);
    if constexpr (!kPair) return {dx, in.g};
    return {dx, gradient(a.uses_x2, in.g, p[Slot::scale2], p[Slot::of_x2], in.centred2, p[Slot::constant2])};
  }
};

template <class T, bool kInDouble, class F>
FUSEDRES_INLINE void with_reduce(const BackwardArgs<T>& a, const F& f) {
  if constexpr (kInDouble) {
    return a.x2 ? f(Reduce<T, ReluMask::none, true, true>{a}) : f(Reduce<T, ReluMask::none, false, true>{a});
  }
  if (a.x2) {
    return a.relu == ReluMask::none ? f(Reduce<T, ReluMask::none, true>{a})
                                    : f(Reduce<T, ReluMask::recomputed, true>{a});
  }
  switch (a.relu) {
    case ReluMask::none:
      return f(Reduce<T, ReluMask::none, false>{a});
    case ReluMask::recomputed:
      return f(Reduce<T, ReluMask::recomputed, false>{a});
    case ReluMask::stored:
      return f(Reduce<T, ReluMask::stored, false>{a});
  }
}

template <class T, bool kUsesX, bool kStream, class F>
FUSEDRES_INLINE void with_backward(const BackwardArgs<T>& a, const F& f) {
  if (a.x2) {
    return a.relu == ReluMask::none ? f(Backward<T, ReluMask::none, true, kUsesX, kStream>{a})
                                    : f(Backward<T, ReluMask::recomputed, true, kUsesX, kStream>{a});
  }
  switch (a.relu) {
    case ReluMask::none:
      return f(Backward<T, ReluMask::none, false, kUsesX, kStream>{a});
    case ReluMask::recomputed:
      return f(Backward<T, ReluMask::recomputed, false, kUsesX, kStream>{a});
    case ReluMask::stored:
      return f(Backward<T, ReluMask::stored, false, kUsesX, kStream>{a});
  }
}

template <class T, bool kStream, class F>
FUSEDRES_INLINE void walk_backward(const BackwardArgs<T>& a, const F& f) {
  if (!a.uses_x && !a.uses_x2) return with_backward<T, false, false>(a, f);
  if (kStream && a.stream) return with_backward<T, true, kStream>(a, f), finish_streams(true);
  with_backward<T, true, false>(a, f);
}

template <class T>
void reduce_rows_of(const BackwardArgs<T>& a, const Rows& rows, const Range& r, double* const* sums) {
  const bool adjacent = rows.width * static_cast<int64_t>(sizeof(T)) <= kAdjacentRowBytes;
  with_sums<T>(a.in_double, [&]<bool kInDouble>(std::bool_constant<kInDouble>) {
    constexpr int kRows = kTogether<typename Sums<T, kInDouble>::Scalar>;
    with_reduce<T, kInDouble>(a, [&](const auto& body) {
      adjacent ? reduce_rows<kRows>(body, rows, r.begin, r.end, r.c0, r.c1, sums)
               : reduce_rows<1>(body, rows, r.begin, r.end, r.c0, r.c1, sums);
    });
  });
}

template <class T>
void reduce_planes_of(const BackwardArgs<T>& a, const Planes& planes, const Range& r, double* const* sums) {
  with_sums<T>(a.in_double, [&]<bool kInDouble>(std::bool_constant<kInDouble>) {
    with_reduce<T, kInDouble>(
        a, [&](const auto& body) { reduce_planes(body, planes, r.begin, r.end, r.c0, r.c1, sums); });
  });
}

template <class T>
void backward_rows(const BackwardArgs<T>& a, const Rows& rows, const Range& r) {
  walk_backward<T, kHasStreams>(a, [&](const auto& body) { map_rows(body, rows, r.begin, r.end, r.c0, r.c1); });
}

template <class T>
void backward_planes(const BackwardArgs<T>& a, const Planes& planes, const Range& r) {
  walk_backward<T, false>(a, [&](const auto& body) { map_planes(body, planes, r.begin, r.end, r.c0, r.c1); });
}

}  // namespace

namespace FUSEDRES_ISA {

template <class T>
const BatchNormKernels<T>& batch_norm_kernels() {
  static constexpr BatchNormKernels<T> kernels{
      statistics_rows<T>,
      statistics_planes<T>,
      forward_rows<T>,
      forward_planes<T>,
      reduce_rows_of<T>,
      reduce_planes_of<T>,
      backward_rows<T>,
      backward_planes<T>,
  };
  return kernels;
}

template const BatchNormKernels<float>& batch_norm_kernels<float>();
template const BatchNormKernels<double>& batch_norm_kernels<double>();
template const BatchNormKernels<bf16>& batch_norm_kernels<bf16>();
template const BatchNormKernels<half>& batch_norm_kernels<half>();

}  // namespace FUSEDRES_ISA
}  // namespace fusedres::cpu

#else  // drivers and registration

#include "batch_norm.h"

namespace fusedres::cpu {
namespace {

template <class T>
void run_forward(ForwardArgs<T> args, const Tiling& tiling, Norm<T>* const* norms, int64_t count) {
  const auto& kernels = batch_norm_kernels<T>();
  const auto walk = [&](const Range& range) {
    if (tiling.layout.channels_last) {
      kernels.forward_rows(args, tiling.rows, range);
    } else {
      kernels.forward_planes(args, tiling.planes, range);
    }
  };
  bool any_training = false;
  for (int64_t i = 0; i < count; ++i) any_training |= norms[i]->training;
  const int64_t cached = any_training ? tiling.cached_channels(sizeof(T)) : 0;
  const int64_t tasks = cached ? ceil_div(tiling.columns, cached) : 0;
  if (tasks >= threads()) {
    for_each_task(tasks, tiling.layout.numel(), [&](int64_t task) {
      const auto [c0, c1] = columns_of(task, cached, tiling.columns);
      for (int64_t i = 0; i < count; ++i) {
        if (norms[i]->training) {
          for (int64_t block = 0; block < tiling.blocks; ++block) norms[i]->block_statistics(block, c0, c1);
        }
        norms[i]->finish(c0, c1);
      }
      walk({0, tiling.height, c0, c1});
    });
  } else {
    all_statistics(tiling, norms, count);
    for_each_piece_backwards(tiling, walk);
  }
}

template <class T>
void run_backward(
    BackwardArgs<T> args,
    const Tiling& tiling,
    NormBackward<T>* const* norms,
    int64_t count,
    bool reduce,
    double* sum_g) {
  const auto& kernels = batch_norm_kernels<T>();
  const bool apply = args.dx || args.dx2 || args.dresidual;
  const auto reduce_block = [&](int64_t block, int64_t c0, int64_t c1) {
    double* sums[3] = {
        sum_g + block * tiling.columns, norms[0]->sum(block), count > 1 ? norms[1]->sum(block) : nullptr};
    for (int64_t k = 0; k < 1 + count; ++k) std::fill(sums[k] + c0, sums[k] + c1, 0.0);
    const Range range = tiling.block_range(block, c0, c1);
    if (tiling.layout.channels_last) {
      kernels.reduce_rows(args, tiling.rows, range, sums);
    } else {
      kernels.reduce_planes(args, tiling.planes, range, sums);
    }
  };
  const auto walk = [&](const Range& range) {
    if (tiling.layout.channels_last) {
      kernels.backward_rows(args, tiling.rows, range);
    } else {
      kernels.backward_planes(args, tiling.planes, range);
    }
  };
  const int64_t cached = reduce && apply ? tiling.cached_channels(sizeof(T)) : 0;
  const int64_t cached_tasks = cached ? ceil_div(tiling.columns, cached) : 0;
  if (cached_tasks >= threads()) {
    for_each_task(cached_tasks, tiling.layout.numel(), [&](int64_t task) {
      const auto [c0, c1] = columns_of(task, cached, tiling.columns);
      for (int64_t block = 0; block < tiling.blocks; ++block) reduce_block(block, c0, c1);
      for (int64_t i = 0; i < count; ++i) norms[i]->finish(sum_g, true, c0, c1);
      walk({0, tiling.height, c0, c1});
    });
    return;
  }
  if (reduce) for_each_block(tiling, reduce_block);
  for (int64_t i = 0; i < count; ++i) norms[i]->finish(sum_g, reduce, 0, tiling.layout.channels);
  if (apply) for_each_piece_backwards(tiling, walk);
}

std::tuple<Tensor, Tensor, Tensor> batch_norm_act_cpu(
    Tensor x,
    OptionalTensor residual,
    OptionalTensor weight,
    OptionalTensor bias,
    OptionalTensor running_mean,
    OptionalTensor running_var,
    OptionalTensor num_batches_tracked,
    bool training,
    std::optional<double> momentum,
    double eps,
    bool relu,
    bool save_mask) {
  const Layout4d layout = layout_of(x);
  const NormArguments arguments{weight, bias, running_mean, running_var, num_batches_tracked, training, momentum, eps};
  check_norm(arguments, x, layout);
  if (residual) check_same_layout("residual", *residual, x);
  STD_TORCH_CHECK(
      !save_mask || (relu && residual), "save_mask is for a residual and a ReLU; otherwise the mask is recomputed");
  Tensor out = uninitialized_like(x);
  Tensor stats = empty_statistics(layout, x);
  Tensor mask = empty_vector(save_mask ? mask_bytes(layout) : 0, ScalarType::Byte, x);
  const Tiling tiling(layout);
  dispatch(x.scalar_type(), [&]<class T>(T*) {
    Scratch& scratch =
        Scratch::with(ParamTable<T>::bytes(tiling, false, Direction::forward) + Norm<T>::scratch_bytes(tiling));
    ParamTable<T> params(scratch, tiling, false, Direction::forward);
    Norm<T> norm(arguments, data<T>(x), tiling, stats, params, scratch);
    ForwardArgs<T> args{};
    args.params = params.data();
    args.x = data<T>(x);
    args.residual = data<T>(residual);
    args.out = data<T>(out);
    args.mask = save_mask ? data<uint16_t>(mask) : nullptr;
    args.relu = relu;
    args.stream = layout.channels_last && streams<T>(layout.numel());
    Norm<T>* norms[] = {&norm};
    run_forward(args, tiling, norms, 1);
  });
  return {out, stats, mask};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> batch_norm_act_backward_cpu(
    Tensor dy,
    Tensor x,
    OptionalTensor weight,
    OptionalTensor bias,
    Tensor stats,
    OptionalTensor mask,
    bool training,
    bool relu,
    bool need_dx,
    bool need_dresidual,
    bool need_affine) {
  const Layout4d layout = layout_of(x);
  check_same_layout("dy", dy, x);
  check_channel_vectors({&weight, &bias}, x, layout.channels);
  check_statistics(stats, x, layout.channels);
  if (mask) check_mask(*mask, x, mask_bytes(layout));
  Tensor dx = wanted_like(need_dx, x);
  Tensor dresidual = wanted_like(need_dresidual, x);
  Tensor dweight = wanted_parameter_gradient(need_affine, weight, stats);
  Tensor dbias = wanted_parameter_gradient(need_affine, weight, stats);
  const Tiling tiling(layout);
  dispatch(x.scalar_type(), [&]<class T>(T*) {
    const int64_t sums = tiling.columns * tiling.blocks;
    Scratch& scratch = Scratch::with(
        ParamTable<T>::bytes(tiling, false, Direction::backward) + NormBackward<T>::scratch_bytes(tiling) +
        sizeof(double) * sums);
    ParamTable<T> params(scratch, tiling, false, Direction::backward);
    NormBackward<T> norm(
        stats,
        weight,
        bias,
        training,
        tiling,
        need_affine ? OptionalTensor(dweight) : OptionalTensor(),
        need_affine ? OptionalTensor(dbias) : OptionalTensor(),
        params,
        scratch);
    BackwardArgs<T> args{};
    args.params = params.data();
    args.dy = data<T>(dy);
    args.x = data<T>(x);
    args.mask = data<uint16_t>(mask);
    args.relu = !relu ? ReluMask::none : args.mask ? ReluMask::stored : ReluMask::recomputed;
    args.dx = need_dx ? data<T>(dx) : nullptr;
    args.dresidual = need_dresidual ? data<T>(dresidual) : nullptr;
    args.uses_x = training;
    args.stream = layout.channels_last && streams<T>(layout.numel());
    args.in_double = tiling.sums_in_double;
    NormBackward<T>* norms[] = {&norm};
    run_backward(args, tiling, norms, 1, need_affine || (training && need_dx), scratch.take<double>(sums));
  });
  return {dx, dresidual, dweight, dbias};
}

std::tuple<Tensor, Tensor, Tensor> batch_norm_add_batch_norm_act_cpu(
    Tensor x,
    OptionalTensor weight,
    OptionalTensor bias,
    OptionalTensor running_mean,
    OptionalTensor running_var,
    OptionalTensor num_batches_tracked,
    bool training,
    std::optional<double> momentum,
    double eps,
    Tensor x2,
    OptionalTensor weight2,
    OptionalTensor bias2,
    OptionalTensor running_mean2,
    OptionalTensor running_var2,
    OptionalTensor num_batches_tracked2,
    bool training2,
    std::optional<double> momentum2,
    double eps2,
    bool relu) {
  const Layout4d layout = layout_of(x);
  const NormArguments first{weight, bias, running_mean, running_var, num_batches_tracked, training, momentum, eps};
  const NormArguments second{
      weight2, bias2, running_mean2, running_var2, num_batches_tracked2, training2, momentum2, eps2};
  check_norm(first, x, layout);
  check_norm(second, x, layout);
  check_same_layout("x2", x2, x);
  Tensor out = uninitialized_like(x);
  Tensor stats = empty_statistics(layout, x);
  Tensor stats2 = empty_statistics(layout, x);
  const Tiling tiling(layout);
  dispatch(x.scalar_type(), [&]<class T>(T*) {
    Scratch& scratch =
        Scratch::with(ParamTable<T>::bytes(tiling, true, Direction::forward) + 2 * Norm<T>::scratch_bytes(tiling));
    ParamTable<T> params(scratch, tiling, true, Direction::forward);
    Norm<T> norm(first, data<T>(x), tiling, stats, params, scratch);
    Norm<T> norm2(second, data<T>(x2), tiling, stats2, params, scratch, Which::second);
    ForwardArgs<T> args{};
    args.params = params.data();
    args.x = data<T>(x);
    args.x2 = data<T>(x2);
    args.out = data<T>(out);
    args.relu = relu;
    args.stream = layout.channels_last && streams<T>(layout.numel());
    Norm<T>* norms[] = {&norm, &norm2};
    run_forward(args, tiling, norms, 2);
  });
  return {out, stats, stats2};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> batch_norm_add_batch_norm_act_backward_cpu(
    Tensor dy,
    Tensor x,
    OptionalTensor weight,
    OptionalTensor bias,
    Tensor stats,
    bool training,
    Tensor x2,
    OptionalTensor weight2,
    OptionalTensor bias2,
    Tensor stats2,
    bool training2,
    bool relu,
    bool need_dx,
    bool need_dx2,
    bool need_affine,
    bool need_affine2) {
  const Layout4d layout = layout_of(x);
  check_same_layout("dy", dy, x);
  check_same_layout("x2", x2, x);
  check_channel_vectors({&weight, &bias}, x, layout.channels);
  check_channel_vectors({&weight2, &bias2}, x, layout.channels);
  check_statistics(stats, x, layout.channels);
  check_statistics(stats2, x, layout.channels);
  Tensor dx = wanted_like(need_dx, x);
  Tensor dx2 = wanted_like(need_dx2, x);
  Tensor dweight = wanted_parameter_gradient(need_affine, weight, stats);
  Tensor dbias = wanted_parameter_gradient(need_affine, weight, stats);
  Tensor dweight2 = wanted_parameter_gradient(need_affine2, weight2, stats2);
  Tensor dbias2 = wanted_parameter_gradient(need_affine2, weight2, stats2);
  const auto if_wanted = [](bool wanted, const Tensor& t) { return wanted ? OptionalTensor(t) : OptionalTensor(); };
  const Tiling tiling(layout);
  dispatch(x.scalar_type(), [&]<class T>(T*) {
    const int64_t sums = tiling.columns * tiling.blocks;
    Scratch& scratch = Scratch::with(
        ParamTable<T>::bytes(tiling, true, Direction::backward) + 2 * NormBackward<T>::scratch_bytes(tiling) +
        sizeof(double) * sums);
    ParamTable<T> params(scratch, tiling, true, Direction::backward);
    NormBackward<T> norm(
        stats,
        weight,
        bias,
        training,
        tiling,
        if_wanted(need_affine, dweight),
        if_wanted(need_affine, dbias),
        params,
        scratch);
    NormBackward<T> norm2(
        stats2,
        weight2,
        bias2,
        training2,
        tiling,
        if_wanted(need_affine2, dweight2),
        if_wanted(need_affine2, dbias2),
        params,
        scratch,
        Which::second);
    BackwardArgs<T> args{};
    args.params = params.data();
    args.dy = data<T>(dy);
    args.x = data<T>(x);
    args.x2 = data<T>(x2);
    args.relu = relu ? ReluMask::recomputed : ReluMask::none;
    args.dx = need_dx ? data<T>(dx) : nullptr;
    args.dx2 = need_dx2 ? data<T>(dx2) : nullptr;
    args.uses_x = training;
    args.uses_x2 = training2;
    args.stream = layout.channels_last && streams<T>(layout.numel());
    args.in_double = tiling.sums_in_double;
    NormBackward<T>* norms[] = {&norm, &norm2};
    const bool reduce = need_affine || need_affine2 || (training && need_dx) || (training2 && need_dx2);
    run_backward(args, tiling, norms, 2, reduce, scratch.take<double>(sums));
  });
  return {dx, dweight, dbias, dx2, dweight2, dbias2};
}

}  // namespace
}  // namespace fusedres::cpu

STABLE_TORCH_LIBRARY_IMPL(fusedres, CPU, m) {
  m.impl("batch_norm_act", TORCH_BOX(&fusedres::cpu::batch_norm_act_cpu));
  m.impl("batch_norm_act_backward", TORCH_BOX(&fusedres::cpu::batch_norm_act_backward_cpu));
  m.impl("batch_norm_add_batch_norm_act", TORCH_BOX(&fusedres::cpu::batch_norm_add_batch_norm_act_cpu));
  m.impl(
      "batch_norm_add_batch_norm_act_backward", TORCH_BOX(&fusedres::cpu::batch_norm_add_batch_norm_act_backward_cpu));
}

#endif
