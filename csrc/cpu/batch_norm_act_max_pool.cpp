// max_pool(relu(bn(x))) on a CPU. Compiled once per instruction set for the kernels (FUSEDRES_ISA) and once, without
// it, for the drivers and their registration with torch.
//
// Every input row is normalised once, into a ring of as many rows as a window spans, and the windows read the ring. The
// winner is that of the unrectified activations, rounded to the storage type: where it is positive the ReLU changes
// nothing, and where it is not the window sends no gradient.
#include "max_pool_kernels.h"

#if defined(FUSEDRES_ISA)

#include "traverse.h"

namespace fusedres::cpu {
namespace {

template <class T>
using ScalarFor = typename Compute<T>::Scalar;

template <class V>
FUSEDRES_INLINE V stored_as(const float*, V v) {
  return v;
}
template <class V>
FUSEDRES_INLINE V stored_as(const double*, V v) {
  return v;
}
template <class T, class V>
FUSEDRES_INLINE V stored_as(const T*, V v) {
  T rounded[kLanes];
  store(rounded, v);
  return load(rounded);
}

using Slot = Slots<false>;

// Of the channels [c, c + kLanes), and of channel c.
template <class T>
FUSEDRES_INLINE auto columns(const PoolArgs<T>& a, int64_t c) {
  return column_params<Slot::backward>(a.params, c);
}
template <class T>
FUSEDRES_INLINE auto channel(const PoolArgs<T>& a, int64_t c) {
  return channel_params<Slot::backward>(a.params, c);
}

FUSEDRES_INLINE int64_t padded(int64_t n) { return (n + kLanes - 1) / kLanes * kLanes; }

// First kernel position inside the input and the one after the last, for a window that starts at `start` (may be < 0).
struct Taps {
  int64_t first, last;
};
FUSEDRES_INLINE Taps taps(int64_t start, int64_t kernel, int64_t dilation, int64_t size) {
  if (dilation == 1) return {start < 0 ? -start : 0, size - start < kernel ? size - start : kernel};
  const int64_t first = start < 0 ? (-start + dilation - 1) / dilation : 0;
  const int64_t fitting = start < size ? (size - start + dilation - 1) / dilation : 0;
  return {first, fitting < kernel ? fitting : kernel};
}

// ---- channels_last ----

// The last rows of one image, normalised: y, and with kCentred also x - mean behind it.
template <class T, bool kCentred>
class RowRing {
 public:
  using S = ScalarFor<T>;

  FUSEDRES_INLINE RowRing(PoolArgs<T> a, Pooling p, S* memory)
      : a_(a), p_(p), channels_(padded(p.channels)), memory_(memory) {}

  // y of a row that has been filled; x - mean is `centred_offset()` further on.
  FUSEDRES_INLINE const S* row(int64_t ih) const { return memory_ + (ih % p_.span_h()) * p_.width * channels_; }
  FUSEDRES_INLINE int64_t centred_offset() const { return p_.span_h() * p_.width * channels_; }
  FUSEDRES_INLINE int64_t channels() const { return channels_; }

  // Makes rows [begin, end) of image n available, if they are not already.
  FUSEDRES_INLINE void need(int64_t n, int64_t begin, int64_t end) {
    if (n != image_ || begin < first_ || begin > filled_) first_ = filled_ = begin;
    image_ = n;
    for (; filled_ < end; ++filled_) fill(filled_);
  }

 private:
  FUSEDRES_INLINE void fill(int64_t ih) {
    const T* x = a_.x + (image_ * p_.height + ih) * p_.width * p_.channels;
    S* y = memory_ + (ih % p_.span_h()) * p_.width * channels_;
    const int64_t full = p_.channels / kLanes * kLanes;
    for (int64_t iw = 0; iw < p_.width; ++iw, x += p_.channels, y += channels_) {
      for (int64_t c = 0; c < full; c += kLanes) normalise(c, load(x + c), y + c);
      if (full < p_.channels) normalise(full, load_n(x + full, static_cast<int>(p_.channels - full)), y + full);
    }
  }
  template <class V>
  FUSEDRES_INLINE void normalise(int64_t c, V x, S* y) const {
    const auto p = columns(a_, c);
    const V centred = x - p[Slot::mean];
    store(y, stored_as(a_.x, fma(centred, p[Slot::scale], p[Slot::shift])));
    if constexpr (kCentred) store(y + centred_offset(), centred);
  }

  const PoolArgs<T> a_;
  const Pooling p_;
  const int64_t channels_;
  S* const memory_;
  int64_t image_ = -1;
  int64_t first_ = 0, filled_ = 0;
};

template <class T>
void forward_rows(PoolArgs<T> a, Pooling p, int64_t begin, int64_t end, ScalarFor<T>* scratch) {
  using S = ScalarFor<T>;
  RowRing<T, false> ring(a, p, scratch);
  const int64_t channels = ring.channels();
  const S* lines[kNoWinner];  // the window's rows
  for (int64_t row = begin; row < end; ++row) {
    const int64_t n = row / p.out_height;
    const int64_t ih0 = row % p.out_height * p.stride_h - p.pad_h;
    const Taps h = taps(ih0, p.kernel_h, p.dilation_h, p.height);
    ring.need(n, ih0 + h.first * p.dilation_h, ih0 + (h.last - 1) * p.dilation_h + 1);
    for (int64_t kh = h.first; kh < h.last; ++kh) lines[kh] = ring.row(ih0 + kh * p.dilation_h);
    T* out = a.out + row * p.out_width * p.channels;
    for (int64_t ow = 0; ow < p.out_width; ++ow, out += p.channels) {
      const int64_t iw0 = ow * p.stride_w - p.pad_w;
      const Taps w = taps(iw0, p.kernel_w, p.dilation_w, p.width);
      for (int64_t c = 0; c < p.channels; c += kLanes) {
        auto best = broadcast(a.relu ? S(0) : -S(INFINITY));
        for (int64_t kh = h.first; kh < h.last; ++kh) {
          const S* y = lines[kh] + c;
          for (int64_t kw = w.first; kw < w.last; ++kw) {
            const auto v = load(y + (iw0 + kw * p.dilation_w) * channels);
            best = blend(greater_or_nan(v, best), v, best);
          }
        }
        if (c + kLanes <= p.channels) {
          store(out + c, best);
        } else {
          store_n(out + c, best, static_cast<int>(p.channels - c));
        }
      }
    }
  }
}

template <class T>
void winners_rows(
    PoolArgs<T> a, Pooling p, int64_t begin, int64_t end, ScalarFor<T>* scratch, double* sum_g, double* sum_gx) {
  using S = ScalarFor<T>;
  RowRing<T, true> ring(a, p, scratch);
  const int64_t channels = ring.channels();
  const int64_t centred = ring.centred_offset();
  S* row_g = scratch + 2 * p.span_h() * p.width * channels;
  S* row_gx = row_g + channels;
  const S* lines[kNoWinner];  // the window's rows
  for (int64_t row = begin; row < end; ++row) {
    const int64_t n = row / p.out_height;
    const int64_t ih0 = row % p.out_height * p.stride_h - p.pad_h;
    const Taps h = taps(ih0, p.kernel_h, p.dilation_h, p.height);
    ring.need(n, ih0 + h.first * p.dilation_h, ih0 + (h.last - 1) * p.dilation_h + 1);
    for (int64_t kh = h.first; kh < h.last; ++kh) lines[kh] = ring.row(ih0 + kh * p.dilation_h);
    std::memset(row_g, 0, 2 * channels * sizeof(S));
    for (int64_t ow = 0; ow < p.out_width; ++ow) {
      const int64_t iw0 = ow * p.stride_w - p.pad_w;
      const Taps w = taps(iw0, p.kernel_w, p.dilation_w, p.width);
      const int64_t o = (row * p.out_width + ow) * p.channels;
      for (int64_t c = 0; c < p.channels; c += kLanes) {
        auto best = broadcast(-S(INFINITY));
        auto best_x = load(lines[h.first] + (iw0 + w.first * p.dilation_w) * channels + c + centred);
        auto winner = broadcast(static_cast<S>(h.first * p.kernel_w + w.first));
        for (int64_t kh = h.first; kh < h.last; ++kh) {
          const S* y = lines[kh] + c;
          for (int64_t kw = w.first; kw < w.last; ++kw) {
            const S* at = y + (iw0 + kw * p.dilation_w) * channels;
            const auto v = load(at);
            const auto better = greater_or_nan(v, best);
            best = blend(better, v, best);
            best_x = blend(better, load(at + centred), best_x);
            winner = blend(better, broadcast(static_cast<S>(kh * p.kernel_w + kw)), winner);
          }
        }
        const int n_lanes = static_cast<int>(p.channels - c < kLanes ? p.channels - c : kLanes);
        auto g = n_lanes == kLanes ? load(a.dy + o + c) : load_n(a.dy + o + c, n_lanes);
        if (a.relu) {
          const auto open = positive<T>(best);
          winner = blend(open, winner, broadcast(static_cast<S>(kNoWinner)));
          g = keep(open, g);
        }
        // Past the channels, g is zero and x - mean is finite or masked by the sums' own bounds below.
        add_to(row_g + c, g);
        store(row_gx + c, fma(g, best_x, load(row_gx + c)));
        if (n_lanes == kLanes) {
          store_bytes(a.winners + o + c, winner);
        } else {
          uint8_t bytes[kLanes];
          store_bytes(bytes, winner);
          std::memcpy(a.winners + o + c, bytes, n_lanes);
        }
      }
    }
    for (int64_t c = 0; c < p.channels; ++c) {
      sum_g[c] += static_cast<double>(row_g[c]);
      sum_gx[c] += static_cast<double>(row_gx[c]);
    }
  }
}

// Output positions whose window covers input position `i`: calls f(kernel position, output position).
template <class F>
FUSEDRES_INLINE void for_each_window(
    int64_t i, int64_t kernel, int64_t stride, int64_t pad, int64_t dilation, int64_t out_size, const F& f) {
  for (int64_t k = 0; k < kernel; ++k) {
    const int64_t from = i + pad - k * dilation;
    if (from < 0) break;
    if (from % stride == 0 && from / stride < out_size) f(k, from / stride);
  }
}

template <class T, bool kFull, bool kStream>
FUSEDRES_INLINE void backward_pixel(
    PoolArgs<T> a,
    Pooling p,
    int64_t i,
    int64_t c,
    const int64_t* positions,
    const uint8_t* offsets,
    int count,
    int lanes) {
  auto g = broadcast(ScalarFor<T>(0));
  for (int k = 0; k < count; ++k) {
    const int64_t o = positions[k] * p.channels + c;
    if constexpr (kFull) {
      g = g + keep(bytes_equal(a.winners + o, offsets[k], g), load(a.dy + o));
    } else {
      uint8_t winners[kLanes];
      std::memset(winners, kNoWinner, sizeof winners);
      std::memcpy(winners, a.winners + o, lanes);
      g = g + keep(bytes_equal(winners, offsets[k], g), load_n(a.dy + o, lanes));
    }
  }
  const auto of = columns(a, c);
  auto dx = g * of[Slot::scale];
  if (a.uses_x) {
    const auto centred = get<kFull>(a.x + i + c, lanes) - of[Slot::mean];
    dx = fma(of[Slot::scale], g, fma(of[Slot::of_x], centred, of[Slot::constant]));
  }
  put<kFull, kStream>(a.dx + i + c, dx, lanes);
}

template <class T, bool kStream>
FUSEDRES_INLINE void backward_rows_to(PoolArgs<T> a, Pooling p, int64_t begin, int64_t end) {
  // A pixel lies in at most one window per kernel position.
  int64_t positions[kNoWinner];
  uint8_t offsets[kNoWinner];
  for (int64_t row = begin; row < end; ++row) {
    const int64_t n = row / p.height;
    for (int64_t iw = 0; iw < p.width; ++iw) {
      int count = 0;
      for_each_window(
          row % p.height, p.kernel_h, p.stride_h, p.pad_h, p.dilation_h, p.out_height, [&](int64_t kh, int64_t oh) {
            for_each_window(
                iw, p.kernel_w, p.stride_w, p.pad_w, p.dilation_w, p.out_width, [&](int64_t kw, int64_t ow) {
                  positions[count] = (n * p.out_height + oh) * p.out_width + ow;
                  offsets[count++] = static_cast<uint8_t>(kh * p.kernel_w + kw);
                });
          });
      const int64_t i = (row * p.width + iw) * p.channels;
      int64_t c = 0;
      for (; c + kLanes <= p.channels; c += kLanes) {
        backward_pixel<T, true, kStream>(a, p, i, c, positions, offsets, count, kLanes);
      }
      if (c < p.channels) {
        backward_pixel<T, false, false>(a, p, i, c, positions, offsets, count, static_cast<int>(p.channels - c));
      }
    }
  }
}

template <class T>
void backward_rows(PoolArgs<T> a, Pooling p, int64_t begin, int64_t end) {
  a.stream ? backward_rows_to<T, true>(a, p, begin, end) : backward_rows_to<T, false>(a, p, begin, end);
  finish_streams(a.stream);
}

// ---- contiguous ----

// The last rows of one plane, normalised and split by column modulo stride (see Pooling): y, and x - mean behind it.
// Where there is padding y is minus infinity, which never wins.
template <class T>
class PlaneRing {
 public:
  using S = ScalarFor<T>;

  FUSEDRES_INLINE PlaneRing(PoolArgs<T> a, Pooling p, S* memory)
      : a_(a), p_(p), length_(p.row_length()), memory_(memory), unsplit_(memory + 2 * p.span_h() * length_) {
    for (int64_t i = 0; i < p.span_h() * length_; ++i) {
      memory_[i] = -S(INFINITY);
      memory_[i + p.span_h() * length_] = S(0);
    }
  }

  FUSEDRES_INLINE const S* row(int64_t ih) const { return memory_ + (ih % p_.span_h()) * length_; }
  FUSEDRES_INLINE int64_t centred_offset() const { return p_.span_h() * length_; }
  FUSEDRES_INLINE void start(int64_t plane) {
    plane_ = plane;
    first_ = filled_ = 0;
  }
  FUSEDRES_INLINE void need(int64_t begin, int64_t end) {
    if (begin < first_ || begin > filled_) first_ = filled_ = begin;
    for (; filled_ < end; ++filled_) fill(filled_);
  }

 private:
  FUSEDRES_INLINE void fill(int64_t ih) {
    const auto p = channel(a_, plane_ % p_.channels);
    const T* x = a_.x + (plane_ * p_.height + ih) * p_.width;
    S* centred_unsplit = unsplit_ + padded(p_.width);
    for (int64_t iw = 0; iw < p_.width; iw += kLanes) {
      const auto v = iw + kLanes <= p_.width ? load(x + iw) : load_n(x + iw, static_cast<int>(p_.width - iw));
      const auto centred = v - p[Slot::mean];
      store(unsplit_ + iw, stored_as(a_.x, fma(centred, p[Slot::scale], p[Slot::shift])));
      store(centred_unsplit + iw, centred);
    }
    S* y = memory_ + (ih % p_.span_h()) * length_ + p_.part_margin();
    if (p_.stride_w == 2) {
      split<2>(unsplit_, y);
      split<2>(centred_unsplit, y + centred_offset());
    } else {
      split<0>(unsplit_, y);
      split<0>(centred_unsplit, y + centred_offset());
    }
  }
  template <int kStride>
  FUSEDRES_INLINE void split(const S* from, S* to) const {
    const int64_t stride = kStride ? kStride : p_.stride_w;
    const int64_t part = p_.part_length();
    for (int64_t phase = 0; phase < stride; ++phase) {
      const int64_t count = (p_.width - phase + stride - 1) / stride;
      for (int64_t j = 0; j < count; ++j) to[phase * part + j] = from[phase + j * stride];
    }
  }

  const PoolArgs<T> a_;
  const Pooling p_;
  const int64_t length_;
  S* const memory_;
  S* const unsplit_;
  int64_t plane_ = 0;
  int64_t first_ = 0, filled_ = 0;
};

template <class T>
void forward_planes(PoolArgs<T> a, Pooling p, int64_t begin, int64_t end, ScalarFor<T>* scratch) {
  using S = ScalarFor<T>;
  PlaneRing<T> ring(a, p, scratch);
  const S* lines[kNoWinner];   // the window's rows
  int64_t offsets[kNoWinner];  // of its columns, in a row
  for (int64_t kw = 0; kw < p.kernel_w; ++kw) offsets[kw] = p.tap_offset(kw);
  for (int64_t plane = begin; plane < end; ++plane) {
    ring.start(plane);
    for (int64_t oh = 0; oh < p.out_height; ++oh) {
      const int64_t ih0 = oh * p.stride_h - p.pad_h;
      const Taps h = taps(ih0, p.kernel_h, p.dilation_h, p.height);
      ring.need(ih0 + h.first * p.dilation_h, ih0 + (h.last - 1) * p.dilation_h + 1);
      for (int64_t kh = h.first; kh < h.last; ++kh) lines[kh] = ring.row(ih0 + kh * p.dilation_h);
      T* out = a.out + (plane * p.out_height + oh) * p.out_width;
      for (int64_t ow = 0; ow < p.out_width; ow += kLanes) {
        auto best = broadcast(a.relu ? S(0) : -S(INFINITY));
        for (int64_t kh = h.first; kh < h.last; ++kh) {
          for (int64_t kw = 0; kw < p.kernel_w; ++kw) {
            const auto v = load(lines[kh] + offsets[kw] + ow);
            best = blend(greater_or_nan(v, best), v, best);
          }
        }
        if (ow + kLanes <= p.out_width) {
          store(out + ow, best);
        } else {
          store_n(out + ow, best, static_cast<int>(p.out_width - ow));
        }
      }
    }
  }
}

template <class T>
void winners_planes(
    PoolArgs<T> a, Pooling p, int64_t begin, int64_t end, ScalarFor<T>* scratch, double* sum_g, double* sum_gx) {
  using S = ScalarFor<T>;
  PlaneRing<T> ring(a, p, scratch);
  const int64_t centred = ring.centred_offset();
  const S* lines[kNoWinner];   // the window's rows
  int64_t offsets[kNoWinner];  // of its columns, in a row
  for (int64_t kw = 0; kw < p.kernel_w; ++kw) offsets[kw] = p.tap_offset(kw);
  // Where nothing wins, all being minus infinity, the first position inside the input does, as in torch.
  S* first_position = scratch + 2 * p.span_h() * p.row_length() + 2 * padded(p.width);
  for (int64_t ow = 0; ow < p.out_width; ++ow) {
    const Taps w = taps(ow * p.stride_w - p.pad_w, p.kernel_w, p.dilation_w, p.width);
    first_position[ow] = static_cast<S>(w.first);
  }
  for (int64_t plane = begin; plane < end; ++plane) {
    ring.start(plane);
    double total_g = 0.0, total_gx = 0.0;
    for (int64_t oh = 0; oh < p.out_height; ++oh) {
      const int64_t ih0 = oh * p.stride_h - p.pad_h;
      const Taps h = taps(ih0, p.kernel_h, p.dilation_h, p.height);
      ring.need(ih0 + h.first * p.dilation_h, ih0 + (h.last - 1) * p.dilation_h + 1);
      for (int64_t kh = h.first; kh < h.last; ++kh) lines[kh] = ring.row(ih0 + kh * p.dilation_h);
      const int64_t o = (plane * p.out_height + oh) * p.out_width;
      S row_g[kLanes] = {}, row_gx[kLanes] = {};
      for (int64_t ow = 0; ow < p.out_width; ow += kLanes) {
        auto best = broadcast(-S(INFINITY));
        auto best_x = broadcast(S(0));
        auto winner = load(first_position + ow) + broadcast(static_cast<S>(h.first * p.kernel_w));
        for (int64_t kh = h.first; kh < h.last; ++kh) {
          for (int64_t kw = 0; kw < p.kernel_w; ++kw) {
            const S* at = lines[kh] + offsets[kw] + ow;
            const auto v = load(at);
            const auto better = greater_or_nan(v, best);
            best = blend(better, v, best);
            best_x = blend(better, load(at + centred), best_x);
            winner = blend(better, broadcast(static_cast<S>(kh * p.kernel_w + kw)), winner);
          }
        }
        const int n = static_cast<int>(p.out_width - ow < kLanes ? p.out_width - ow : kLanes);
        auto g = n == kLanes ? load(a.dy + o + ow) : load_n(a.dy + o + ow, n);
        if (a.relu) {
          const auto open = positive<T>(best);
          winner = blend(open, winner, broadcast(static_cast<S>(kNoWinner)));
          g = keep(open, g);
        }
        if (n < kLanes) {  // what lies behind the last column is not a window
          g = keep(first_lanes(n, g), g);
          best_x = keep(first_lanes(n, g), best_x);
        }
        add_to(row_g, g);
        store(row_gx, fma(g, best_x, load(row_gx)));
        uint8_t bytes[kLanes];
        store_bytes(bytes, winner);
        std::memcpy(a.winners + o + ow, bytes, n);
      }
      for (int i = 0; i < kLanes; ++i) {
        total_g += static_cast<double>(row_g[i]);
        total_gx += static_cast<double>(row_gx[i]);
      }
    }
    sum_g[plane % p.channels] += total_g;
    sum_gx[plane % p.channels] += total_gx;
  }
}

template <class T>
void backward_planes(PoolArgs<T> a, Pooling p, int64_t begin, int64_t end, ScalarFor<T>* scratch) {
  using S = ScalarFor<T>;
  const int64_t area = p.height * p.width;
  S* g = scratch;
  S* dy = g + padded(area);
  int64_t offsets[kNoWinner];  // of the positions of a window, in the plane
  for (int64_t k = 0; k < p.kernel_h * p.kernel_w; ++k) {
    offsets[k] = k / p.kernel_w * p.dilation_h * p.width + k % p.kernel_w * p.dilation_w;
  }
  for (int64_t plane = begin; plane < end; ++plane) {
    std::memset(g, 0, area * sizeof(S));
    for (int64_t oh = 0; oh < p.out_height; ++oh) {
      const int64_t o = (plane * p.out_height + oh) * p.out_width;
      for (int64_t ow = 0; ow < p.out_width; ow += kLanes) {
        const int n = static_cast<int>(p.out_width - ow < kLanes ? p.out_width - ow : kLanes);
        store(dy + ow, n == kLanes ? load(a.dy + o + ow) : load_n(a.dy + o + ow, n));
      }
      for (int64_t ow = 0; ow < p.out_width; ++ow) {
        const int64_t k = a.winners[o + ow];
        if (k == kNoWinner) continue;
        g[(oh * p.stride_h - p.pad_h) * p.width + ow * p.stride_w - p.pad_w + offsets[k]] += dy[ow];
      }
    }
    const auto of = channel(a, plane % p.channels);
    const T* x = a.x + plane * area;
    T* dx = a.dx + plane * area;
    const auto gradient = [&](auto gradient_of_y, auto value) {
      if (!a.uses_x) return of[Slot::scale] * gradient_of_y;
      return fma(of[Slot::scale], gradient_of_y, fma(of[Slot::of_x], value - of[Slot::mean], of[Slot::constant]));
    };
    const int64_t full = area / kLanes * kLanes;
    for (int64_t i = 0; i < full; i += kLanes) store(dx + i, gradient(load(g + i), load(x + i)));
    if (full < area) {
      const int n = static_cast<int>(area - full);
      store_n(dx + full, gradient(load_n(g + full, n), load_n(x + full, n)), n);
    }
  }
}

}  // namespace

namespace FUSEDRES_ISA {

template <class T>
const MaxPoolKernels<T>& max_pool_kernels() {
  static constexpr MaxPoolKernels<T> kernels{
      forward_rows<T>,
      forward_planes<T>,
      winners_rows<T>,
      winners_planes<T>,
      backward_rows<T>,
      backward_planes<T>,
  };
  return kernels;
}

template const MaxPoolKernels<float>& max_pool_kernels<float>();
template const MaxPoolKernels<double>& max_pool_kernels<double>();
template const MaxPoolKernels<bf16>& max_pool_kernels<bf16>();
template const MaxPoolKernels<half>& max_pool_kernels<half>();

}  // namespace FUSEDRES_ISA
}  // namespace fusedres::cpu

#else  // drivers and registration

#include "batch_norm.h"
#include "common/max_pool.h"

namespace fusedres::cpu {
namespace {

template <class T>
const MaxPoolKernels<T>& max_pool_kernels() {
  FUSEDRES_RETURN_FOR_THIS_CPU(max_pool_kernels<T>());
}

// Output rows of a task of the channels_last kernels: enough to hide the rows that it normalises twice.
constexpr int64_t kPooledRows = 16;

// The kernels read parameters in whole vectors of channels: the tiling's columns may be more than one repeat of the
// channels, and are then long enough; otherwise the channels are a multiple of the lanes.
std::tuple<Tensor, Tensor> batch_norm_act_max_pool_cpu(
    Tensor x,
    OptionalTensor weight,
    OptionalTensor bias,
    OptionalTensor running_mean,
    OptionalTensor running_var,
    OptionalTensor num_batches_tracked,
    bool training,
    std::optional<double> momentum,
    double eps,
    bool relu,
    Ints kernel,
    Ints stride,
    Ints pad,
    Ints dilation,
    bool ceil_mode) {
  const Layout4d layout = layout_of(x);
  const NormArguments arguments{weight, bias, running_mean, running_var, num_batches_tracked, training, momentum, eps};
  check_norm(arguments, x, layout);
  const Pooling p{pooling_of(layout, kernel, stride, pad, dilation, ceil_mode)};
  const Layout4d pooled = pooled_layout(layout, p);
  Tensor out = empty_pooled(pooled, x);
  Tensor stats = empty_statistics(layout, x);
  const Tiling tiling(layout);
  dispatch(x.scalar_type(), [&]<class T>(T*) {
    using S = typename ScalarOf<T>::type;
    const size_t table = ParamTable<T>::bytes(tiling, false, Direction::backward);
    Scratch& scratch = Scratch::with(table + Norm<T>::scratch_bytes(tiling));
    const int64_t scalars = scratch_scalars(p, layout.channels_last);
    Scratch::with<Scratch::Task>(scalars * sizeof(S));  // fails, if it does, before the statistics move
    ParamTable<T> params(scratch, tiling, false, Direction::backward);
    Norm<T> norm(arguments, data<T>(x), tiling, stats, params, scratch);
    Norm<T>* norms[] = {&norm};
    all_statistics(tiling, norms, 1);
    PoolArgs<T> args{};
    args.params = params.data();
    args.x = data<T>(x);
    args.relu = relu;
    args.out = data<T>(out);
    const auto& kernels = max_pool_kernels<T>();
    const int64_t units = layout.channels_last ? p.batch * p.out_height : p.batch * p.channels;
    const int64_t per_task = layout.channels_last ? kPooledRows : 1;
    for_each_task(ceil_div(units, per_task), layout.numel(), [&](int64_t task) {
      S* memory = Scratch::with<Scratch::Task>(scalars * sizeof(S)).template take<S>(scalars);
      const int64_t end = std::min((task + 1) * per_task, units);
      (layout.channels_last ? kernels.forward_rows : kernels.forward_planes)(args, p, task * per_task, end, memory);
    });
  });
  return {out, stats};
}

std::tuple<Tensor, Tensor, Tensor> batch_norm_act_max_pool_backward_cpu(
    Tensor dy,
    Tensor x,
    OptionalTensor weight,
    OptionalTensor bias,
    Tensor stats,
    bool training,
    bool relu,
    Ints kernel,
    Ints stride,
    Ints pad,
    Ints dilation,
    bool ceil_mode,
    bool need_dx,
    bool need_affine) {
  const Layout4d layout = layout_of(x);
  const Pooling p{pooling_of(layout, kernel, stride, pad, dilation, ceil_mode)};
  const Layout4d pooled = pooled_layout(layout, p);
  check_pooled("dy", dy, pooled, x);
  check_channel_vectors({&weight, &bias}, x, layout.channels);
  check_statistics(stats, x, layout.channels);
  Tensor dx = wanted_like(need_dx, x);
  Tensor dweight = wanted_parameter_gradient(need_affine, weight, stats);
  Tensor dbias = wanted_parameter_gradient(need_affine, weight, stats);
  Tensor winners = empty_vector(pooled.numel(), ScalarType::Byte, x);
  const Tiling tiling(layout);
  const int64_t channels = layout.channels;
  // Blocks of output rows, or of images, that are summed separately; as many whatever the number of threads.
  const int64_t units = layout.channels_last ? p.batch * p.out_height : p.batch;
  const int64_t per_block = layout.channels_last ? std::max(kPooledRows, ceil_div(units, 64)) : ceil_div(units, 64);
  const int64_t blocks = ceil_div(units, per_block);
  dispatch(x.scalar_type(), [&]<class T>(T*) {
    using S = typename ScalarOf<T>::type;
    Scratch& scratch = Scratch::with(
        ParamTable<T>::bytes(tiling, false, Direction::backward) + NormBackward<T>::scratch_bytes(tiling) +
        sizeof(double) * (tiling.columns * tiling.blocks + 2 * channels * blocks));
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
    double* sum_g = scratch.take<double>(tiling.columns * tiling.blocks);
    double* block_sums = scratch.take<double>(2 * channels * blocks);
    std::fill_n(block_sums, 2 * channels * blocks, 0.0);
    PoolArgs<T> args{};
    args.params = params.data();
    args.x = data<T>(x);
    args.relu = relu;
    args.dy = data<T>(dy);
    args.winners = data<uint8_t>(winners);
    args.dx = need_dx ? data<T>(dx) : nullptr;
    args.uses_x = training;
    args.stream = layout.channels_last && channels % kLanes == 0 && streams<T>(layout.numel());
    const auto& kernels = max_pool_kernels<T>();
    const int64_t scalars = scratch_scalars(p, layout.channels_last);
    // Planes of one image are consecutive, and each adds to its own channel: the order of the sums is that of the
    // images.
    const int64_t pieces = layout.channels_last ? 1 : std::min<int64_t>(channels, 16);
    for_each_task(blocks * pieces, layout.numel(), [&](int64_t task) {
      S* memory = Scratch::with<Scratch::Task>(scalars * sizeof(S)).template take<S>(scalars);
      const int64_t block = task / pieces;
      double* g = block_sums + 2 * channels * block;
      const int64_t begin = block * per_block, end = std::min(begin + per_block, units);
      if (layout.channels_last) return kernels.winners_rows(args, p, begin, end, memory, g, g + channels);
      const auto [c0, c1] = columns_of(task % pieces, ceil_div(channels, pieces), channels);
      for (int64_t n = begin; n < end; ++n) {
        kernels.winners_planes(args, p, n * channels + c0, n * channels + c1, memory, g, g + channels);
      }
    });
    // The normalisation's own sums have the tiling's blocks: the first takes everything.
    for (int64_t block = 0; block < tiling.blocks; ++block) {
      std::fill_n(sum_g + block * tiling.columns, tiling.columns, 0.0);
      std::fill_n(norm.sum(block), tiling.columns, 0.0);
    }
    for (int64_t block = 0; block < blocks; ++block) {
      for (int64_t c = 0; c < channels; ++c) {
        sum_g[c] += block_sums[2 * channels * block + c];
        norm.sum(0)[c] += block_sums[2 * channels * block + channels + c];
      }
    }
    norm.finish(sum_g, true, 0, channels);
    if (!need_dx) return;
    const int64_t lines = layout.channels_last ? p.batch * p.height : p.batch * p.channels;
    const int64_t per_task = layout.channels_last ? kPooledRows : 1;
    for_each_task(ceil_div(lines, per_task), layout.numel(), [&](int64_t task) {
      const int64_t end = std::min((task + 1) * per_task, lines);
      if (layout.channels_last) return kernels.backward_rows(args, p, task * per_task, end);
      S* memory = Scratch::with<Scratch::Task>(scalars * sizeof(S)).template take<S>(scalars);
      kernels.backward_planes(args, p, task * per_task, end, memory);
    });
  });
  return {dx, dweight, dbias};
}

}  // namespace
}  // namespace fusedres::cpu

STABLE_TORCH_LIBRARY_IMPL(fusedres, CPU, m) {
  m.impl("batch_norm_act_max_pool", TORCH_BOX(&fusedres::cpu::batch_norm_act_max_pool_cpu));
  m.impl("batch_norm_act_max_pool_backward", TORCH_BOX(&fusedres::cpu::batch_norm_act_max_pool_backward_cpu));
}

#endif
