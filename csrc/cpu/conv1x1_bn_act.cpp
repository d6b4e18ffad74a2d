// A 1x1 convolution into which a batch normalisation in training is folded, on a CPU: second moments of its input, the
// product with its epilogue, and the two products of the backward. Compiled once per instruction set for the kernels
// (FUSEDRES_ISA) and once, without it, for the drivers and their registration with torch.
//
// Rows are pixels. Per row of 4C outputs, with C inputs, forward and backward multiply 2 * 4C * C * 3 numbers and move
// residual, out, dy twice and g: from C = 64 on the arithmetic takes longer, so outputs leave the registers finished.
#include "conv1x1_kernels.h"

#if defined(FUSEDRES_ISA)

#include <algorithm>
#include <type_traits>

#include "gemm.h"

namespace fusedres::cpu {
namespace {

template <class T, class M, bool kNorm, bool kFull>
FUSEDRES_INLINE void widen_vector(const WidenArgs<T>& a, const T* row, int64_t c, int n, void* elements) {
  auto v = get<kFull>(row + c, n);
  if constexpr (kNorm) v = activated<T>(norm_params(a.norm, c), v);
  if constexpr (M::kRows == 2) {
    put<kFull, false>(static_cast<T*>(elements) + c, v, n);
  } else {
    if constexpr (kNorm) v = rounded<T>(v);
    if (a.shift) v = v - get<kFull>(a.shift + c, n);
    put<kFull, false>(static_cast<typename M::Element*>(elements) + c, v, n);
  }
}

template <class T, class M, bool kNorm>
void widen_rows(const WidenArgs<T> a) {
  for (int64_t r = 0; r < a.count; ++r) {
    const T* const row = a.rows[r];
    void* const elements = static_cast<char*>(a.elements) + r * a.row_bytes;
    if constexpr (M::kRows == 2 && !kNorm) {
      std::memcpy(elements, row, a.width * sizeof(T));
    } else {
      int64_t c = 0;
      for (; c + kLanes <= a.width; c += kLanes) widen_vector<T, M, kNorm, true>(a, row, c, kLanes, elements);
      if (c < a.width) widen_vector<T, M, kNorm, false>(a, row, c, static_cast<int>(a.width - c), elements);
    }
    if (M::kRows == 2 && a.width % 2) static_cast<T*>(elements)[a.width] = T{};
  }
}

template <class T, class M>
void widen(const WidenArgs<T>& a) {
  a.norm ? widen_rows<T, M, true>(a) : widen_rows<T, M, false>(a);
}

// `values` to the first `columns` elements; all of them if kFull.
template <bool kFull, bool kStream, class T, class V, int kVectors>
FUSEDRES_INLINE void put_vectors(T* to, const V (&values)[kVectors], int64_t columns) {
  constexpr int kPairs = kFull && kStoredInPairs<T> ? kVectors / 2 : 0;
  if constexpr (kPairs > 0) {
#pragma GCC unroll 8
    for (int v = 0; v < 2 * kPairs; v += 2) store_pair<kStream>(to + v * kLanes, values[v], values[v + 1]);
  }
#pragma GCC unroll 8
  for (int v = 2 * kPairs; v < kVectors; ++v) {
    const int64_t n = columns - v * kLanes;
    put<kFull, kStream>(to + v * kLanes, values[v], static_cast<int>(n < kLanes ? n : kLanes));
  }
}

// What is made of the products: with the residual, with what its mask keeps of it, or the gradient of an activation.
enum class Finish { add, add_kept, gradient };

template <class T, bool kFull, bool kStream, class Vec, int kHeight, int kVectors>
FUSEDRES_INLINE void finish_gradient(
    const MultiplyArgs<T>& a, int64_t row, int64_t c0, Vec (&gradients)[kHeight][kVectors]) {
  const int64_t width = (a.columns + kLanes - 1) / kLanes * kLanes;
#pragma GCC unroll 8
  for (int v = 0; v < kVectors; ++v) {
    const int64_t c = c0 + v * kLanes, n = a.columns - c;
    const auto p = norm_params(a.norm, c);
    const Vec shift = load(a.shift + c);
    Vec sum, weighted;
#pragma GCC unroll 8
    for (int u = 0; u < kHeight; ++u) {
      const Vec x = get<kFull>(a.x + (row + u) * a.columns + c, static_cast<int>(n < kLanes ? n : kLanes));
      const Vec centred = x - p[Slots<false>::mean];
      const Vec dx = rounded<T>(keep(positive<T>(normalised(p, x)), gradients[u][v] + shift));
      sum = u ? sum + dx : dx;
      weighted = u ? fma(dx, centred, weighted) : dx * centred;
      gradients[u][v] = dx;
    }
    add_to(a.sums + c, to_double(sum));
    add_to(a.sums + width + c, to_double(weighted));
  }
#pragma GCC unroll 8
  for (int u = 0; u < kHeight; ++u) put_vectors<kFull, kStream>(a.out[row + u] + c0, gradients[u], a.columns - c0);
}

constexpr int64_t kInnerChain = 256;

template <class T, class M, int kHeight, int kVectors, bool kFull, bool kStream, Finish kFinish>
FUSEDRES_INLINE void multiply_rows(const MultiplyArgs<T>& a, int64_t row, int64_t c0) {
  using Element = typename M::Element;
  using Vec = typename M::Vec;
  const Element* const panel = static_cast<const Element*>(a.panels) + c0 * (a.steps1 + a.steps2);
  const int64_t columns = a.columns - c0;
  Vec sums[kHeight][kVectors];
#pragma GCC unroll 8
  for (auto& of_row : sums) {
#pragma GCC unroll 8
    for (auto& sum : of_row) sum = M::zero();
  }
  if (a.residual) {  // on its way from memory while the products are taken
    for (int u = 0; u < kHeight; ++u) {
      const char* line = reinterpret_cast<const char*>(a.residual[row + u] + c0);
      for (int i = 0; i < kVectors * kLanes * static_cast<int>(sizeof(T)); i += 64) __builtin_prefetch(line + i);
    }
  }
  const Element* rows[kHeight];
  constexpr int64_t kLine = 64 / (M::kRows * sizeof(T));
  const char* near = nullptr;
  const auto bring_near = [&near](int64_t s) {
    if (s % kLine) return;
#pragma GCC unroll 8
    for (int u = 0; u < kHeight; ++u) __builtin_prefetch(near + u * 64);
    near += kHeight * 64;
  };
  if (a.steps2) {  // first, for in the backward it is the smaller part: fewer digits are lost
    for (int u = 0; u < kHeight; ++u) rows[u] = static_cast<const Element*>(a.a2[row + u]);
    const Element* const b = panel + a.steps1 * kPanelColumns<M>;
    if (c0 == 0 && a.next2) {
      near = reinterpret_cast<const char*>(a.next2 + row * a.width2);
      multiply_tile<M>(rows, 1, b, a.steps2, sums, bring_near);
    } else {
      multiply_tile<M>(rows, 1, b, a.steps2, sums);
    }
  }
  for (int u = 0; u < kHeight; ++u) rows[u] = static_cast<const Element*>(a.a1[row + u]);
  const bool has_next = c0 == 0 && row + 2 * kHeight <= a.count;
  near = c0 == 0 && a.next1 ? reinterpret_cast<const char*>(a.next1 + row * a.width1) : nullptr;
  Vec total[kHeight][kVectors] = {};
  for (int64_t first = 0; first < a.steps1; first += kInnerChain) {
    const int64_t steps = std::min(kInnerChain, a.steps1 - first);
    if (first) {  // a chain of all the products would round too often
      for (int u = 0; u < kHeight; ++u) {
        for (int v = 0; v < kVectors; ++v) {
          total[u][v] = total[u][v] + sums[u][v];
          sums[u][v] = M::zero();
        }
      }
    }
    const Element* const b = panel + first * kPanelColumns<M>;
    if (near) {
      multiply_tile<M>(rows, 1, b, steps, sums, bring_near);
    } else if (has_next) {
      multiply_tile<M>(rows, 1, b, steps, sums, [&](int64_t s) {
        if (s % kLine) return;
#pragma GCC unroll 8
        for (int u = 0; u < kHeight; ++u) {
          __builtin_prefetch(static_cast<const Element*>(a.a1[row + kHeight + u]) + first + s);
        }
      });
    } else {
      multiply_tile<M>(rows, 1, b, steps, sums);
    }
    for (int u = 0; u < kHeight; ++u) rows[u] += steps;
  }
  if (a.steps1 > kInnerChain) {
    for (int u = 0; u < kHeight; ++u) {
      for (int v = 0; v < kVectors; ++v) sums[u][v] = total[u][v] + sums[u][v];
    }
  }
  if constexpr (kFinish == Finish::gradient) return finish_gradient<T, kFull, kStream>(a, row, c0, sums);
#pragma GCC unroll 8
  for (int u = 0; u < kHeight; ++u) {
    const T* residual = a.residual ? a.residual[row + u] + c0 : nullptr;
    const int64_t word = ((row + u) * a.columns + c0) / kLanes;
    uint16_t* words = a.mask ? a.mask + word : nullptr;
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) {
      Vec y = sums[u][v] + load(a.shift + c0 + v * kLanes);
      const int64_t n = columns - v * kLanes;
      if (residual) {
        Vec x = get<kFull>(residual + v * kLanes, static_cast<int>(n < kLanes ? n : kLanes));
        if constexpr (kFinish == Finish::add_kept) x = keep(mask_from_bits(a.residual_mask[word + v], x), x);
        y = y + x;
      }
      if (a.relu) {
        const auto m = positive<T>(y);
        y = keep(m, y);
        if (kFull && words) words[v] = bits(m);
      }
      sums[u][v] = y;
    }
    put_vectors<kFull, kStream>(a.out[row + u] + c0, sums[u], columns);
  }
}

template <class T, class M, bool kFull, bool kStream, Finish kFinish>
void multiply_block(const MultiplyArgs<T>& a) {
  for (int64_t c0 = 0; c0 < a.columns; c0 += kPanelColumns<M>) {
    with_vectors<M>(a.columns - c0, [&]<int kVectors>(std::integral_constant<int, kVectors>) {
      int64_t row = 0;
      for (; row + M::kHeight <= a.count; row += M::kHeight) {
        multiply_rows<T, M, M::kHeight, kVectors, kFull, kStream, kFinish>(a, row, c0);
      }
      for (; row < a.count; ++row) multiply_rows<T, M, 1, kVectors, kFull, kStream, kFinish>(a, row, c0);
    });
  }
  finish_streams(kStream);
}

template <class T, class M, Finish kFinish>
void multiply_and(const MultiplyArgs<T>& a) {
  if constexpr (kFinish != Finish::add_kept) {
    if (a.columns % kLanes) return multiply_block<T, M, false, false, kFinish>(a);
  }
  if (kHasStreams && a.stream) return multiply_block<T, M, true, kHasStreams, kFinish>(a);
  multiply_block<T, M, true, false, kFinish>(a);
}

template <class T, class M>
void multiply(const MultiplyArgs<T>& a) {
  if (a.x) return multiply_and<T, M, Finish::gradient>(a);
  if (a.residual_mask) return multiply_and<T, M, Finish::add_kept>(a);
  multiply_and<T, M, Finish::add>(a);
}

template <class T>
void mask_of(const T* out, int64_t count, uint16_t* mask) {
  for (int64_t i = 0; i < count; i += kLanes) {
    const int n = static_cast<int>(count - i < kLanes ? count - i : kLanes);
    mask[i / kLanes] = bits(positive<T>(load_n(out + i, n))) & static_cast<uint16_t>((1u << n) - 1);
  }
}

}  // namespace

namespace FUSEDRES_ISA {

template <class T>
const Conv1x1Kernels<T>& conv1x1_kernels() {
  using M = Operand<T>;
  using Moments = MomentsOperand<T>;
  static constexpr Conv1x1Kernels<T> kernels{
      {kPanelColumns<M>, M::kRows, sizeof(typename M::Element)},
      sizeof(T) * M::kRows == sizeof(typename M::Element),
      widen<T, M>,
      pack<T, M>,
      multiply<T, M>,
      products<M>,
      {kPanelColumns<Moments>, Moments::kRows, sizeof(typename Moments::Element)},
      pack<T, Moments>,
      products<Moments>,
      mask_of<T>,
  };
  return kernels;
}

template const Conv1x1Kernels<float>& conv1x1_kernels<float>();
template const Conv1x1Kernels<double>& conv1x1_kernels<double>();
template const Conv1x1Kernels<bf16>& conv1x1_kernels<bf16>();
template const Conv1x1Kernels<half>& conv1x1_kernels<half>();

}  // namespace FUSEDRES_ISA
}  // namespace fusedres::cpu

#else  // drivers and registration

#include <cmath>
#include <cstring>
#include <type_traits>

#include "add_act.h"
#include "batch_norm.h"

namespace fusedres::cpu {
namespace {

using Slot = Slots<false>;

template <class T>
const Conv1x1Kernels<T>& conv1x1_kernels() {
  FUSEDRES_RETURN_FOR_THIS_CPU(conv1x1_kernels<T>());
}

// The pixels that a 1x1 convolution of some stride takes of a channels_last tensor, as rows of a matrix.
struct Pixels {
  Layout4d layout;
  int64_t stride, height, width;

  Pixels(const char* name, const Tensor& t, int64_t stride_) : layout(layout_of(t)), stride(stride_) {
    STD_TORCH_CHECK(layout.channels_last, name, " must be channels_last");
    STD_TORCH_CHECK(layout.numel() > 0, name, " must not be empty");
    STD_TORCH_CHECK(stride >= 1, "stride must be positive, but got ", stride);
    height = (layout.height - 1) / stride + 1;
    width = (layout.width - 1) / stride + 1;
  }
  int64_t count() const { return layout.batch * height * width; }
  int64_t channels() const { return layout.channels; }
  // Element of the first channel of a row.
  int64_t at(int64_t row) const {
    if (stride == 1) return row * channels();
    const int64_t column = row % width, image_row = row / width;
    const int64_t y = image_row % height, image = image_row / height;
    return ((image * layout.height + y * stride) * layout.width + column * stride) * channels();
  }
};

template <class T, class P>
void point_at(P* const data, const Pixels& pixels, int64_t row, int64_t count, P** rows) {
  for (int64_t r = 0; r < count; ++r) rows[r] = data + pixels.at(row + r);
}

int64_t panel_bytes(const PanelShape& shape, int64_t columns, int64_t steps) {
  return shape.panels(columns) * steps * shape.columns * shape.element_size;
}

int64_t padded(int64_t columns) { return ceil_div(columns, kLanes) * kLanes; }

Tensor empty_matrix(int64_t rows, int64_t columns, ScalarType dtype, const Tensor& like) {
  const int64_t sizes[] = {rows, columns}, strides[] = {columns, 1};
  return empty_strided(sizes, strides, 2, dtype, like);
}

void check_matrix(const char* name, const Tensor& t, int64_t rows, int64_t columns, ScalarType dtype) {
  STD_TORCH_CHECK(
      t.is_cpu() && t.dim() == 2 && t.size(0) == rows && t.size(1) == columns && t.is_contiguous() &&
          t.scalar_type() == dtype,
      name,
      " must be a contiguous matrix of ",
      rows,
      " by ",
      columns,
      " in the dtype of y");
}

void check_shift(const char* name, const Tensor& t, int64_t size, const Tensor& y) {
  const ScalarType dtype = y.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  STD_TORCH_CHECK(
      t.is_cpu() && t.dim() == 1 && t.numel() == size && t.is_contiguous() && t.scalar_type() == dtype,
      name,
      " must have ",
      size,
      " elements in the dtype of sums");
}

void check_normalisation(const OptionalTensor& norm, const Pixels& pixels, const Tensor& y) {
  if (!norm) return;
  const ScalarType dtype = y.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  STD_TORCH_CHECK(
      norm->is_cpu() && norm->dim() == 2 && norm->size(0) == 3 && norm->size(1) == pixels.channels() &&
          norm->is_contiguous() && norm->scalar_type() == dtype,
      "norm must be mean, scale and shift of the channels of y, (3, C) in the dtype of sums");
  STD_TORCH_CHECK(pixels.stride == 1, "norm goes with a stride of 1, but got ", pixels.stride);
}

// Numbers in a normalisation's table.
int64_t norm_size(int64_t channels) { return padded(channels) * Slot::forward; }

// Mean, scale and shift as the kernels take them, zero where there is no channel; null without a norm.
template <class T>
const typename ScalarOf<T>::type* norm_table(const OptionalTensor& norm, int64_t channels, Scratch& scratch) {
  using S = typename ScalarOf<T>::type;
  if (!norm) return nullptr;
  S* const table = scratch.take<S>(norm_size(channels));
  std::fill(table, table + norm_size(channels), S(0));
  for (int64_t c = 0; c < channels; ++c) {
    S* const of_channel = table + c / kLanes * Slot::forward * kLanes + c % kLanes;
    for (int slot : {Slot::mean, Slot::scale, Slot::shift}) {
      of_channel[slot * kLanes] = data<S>(norm)[slot * channels + c];
    }
  }
  return table;
}

// ---- sums over rows ----

// Separate sums over parts of the rows: by the shape alone, so that the bits do not depend on the number of threads.
struct Split {
  int64_t parts, rows;  // rows of a part, whole blocks
  // At most `most` parts, and few where the sums are of many numbers.
  Split(int64_t count, int64_t block, int64_t numbers, int64_t most = 16) {
    most = std::clamp<int64_t>((int64_t{1} << 20) / std::max<int64_t>(1, numbers), 1, most);
    const int64_t blocks = ceil_div(count, block);
    rows = ceil_div(blocks, std::min(most, blocks)) * block;
    parts = ceil_div(count, rows);
  }
  // The parts' sums, of `size` numbers each, to the first.
  void add_parts(double* sums, int64_t size) const {
    for (int64_t part = 1; part < parts; ++part) {
      for (int64_t i = 0; i < size; ++i) sums[i] += sums[part * size + i];
    }
  }
};

// About what the rows are summed, or null: the mean of a few of them, as a float has it, so that a large mean costs no
// digits. 16-bit operands are never shifted, for that would round them.
template <class T>
const typename ScalarOf<T>::type* shift_of(
    const T* y, const Pixels& pixels, const typename ScalarOf<T>::type* norm, Scratch& scratch) {
  if constexpr (sizeof(T) >= 4) {
    const int64_t channels = pixels.channels(), count = pixels.count(), samples = std::min<int64_t>(count, 8);
    T* const shift = scratch.take<T>(channels);
    std::fill(shift, shift + channels, T(0));
    for (int64_t k = 0; k < samples; ++k) {
      // apart, and not at the same place of every image
      const T* row = y + pixels.at(k * count / samples + count / samples * (k * 5 % 8) / 8);
      for (int64_t c = 0; c < channels; ++c) {
        T v = row[c];
        if (norm) {
          const T* const of_channel = norm + c / kLanes * Slot::forward * kLanes + c % kLanes;
          const auto at = [&](int slot) { return of_channel[slot * kLanes]; };
          v = std::max((v - at(Slot::mean)) * at(Slot::scale) + at(Slot::shift), T(0));
        }
        shift[c] += v / static_cast<T>(samples);
      }
    }
    for (int64_t c = 0; c < channels; ++c) {
      if (!std::isfinite(shift[c])) shift[c] = 0;
    }
    return shift;
  }
  return nullptr;
}

std::tuple<Tensor, Tensor> conv1x1_moments_cpu(Tensor y, OptionalTensor norm, int64_t stride) {
  const Pixels pixels("y", y, stride);
  check_normalisation(norm, pixels, y);
  const int64_t channels = pixels.channels(), count = pixels.count(), width = padded(channels);
  Tensor mean = empty_vector(channels, ScalarType::Double, y);
  Tensor cov = empty_matrix(channels, channels, ScalarType::Double, y);
  dispatch(y.scalar_type(), [&]<class T>(T*) {
    const auto& kernels = conv1x1_kernels<T>();
    const PanelShape& shape = kernels.moments_shape;
    const T* const first = data<T>(y);
    const Split split(count, kMomentsRows, channels * width);
    const int64_t part_size = (channels + 1) * width;  // products, then sums
    Scratch& scratch = Scratch::with(sizeof(double) * (split.parts * part_size + width + norm_size(channels)));
    double* const parts = scratch.take<double>(split.parts * part_size);
    const auto* const table = norm_table<T>(norm, channels, scratch);
    const auto* const shift = shift_of(first, pixels, table, scratch);
    for_each_task(split.parts, count * channels, [&](int64_t part) {
      const int64_t steps = shape.steps(kMomentsRows);
      const int64_t panels_bytes = panel_bytes(shape, channels, steps);
      Scratch& mine = Scratch::with<Scratch::Task>(panels_bytes + kMomentsRows * sizeof(T*));
      void* const panels = mine.take<char>(panels_bytes);
      const T** const rows = mine.take<const T*>(kMomentsRows);
      double* const products = parts + part * part_size;
      std::fill(products, products + part_size, 0.0);
      const int64_t end = std::min((part + 1) * split.rows, count);
      for (int64_t row = part * split.rows; row < end; row += kMomentsRows) {
        const int64_t size = std::min(kMomentsRows, end - row);
        point_at<T>(first, pixels, row, size, rows);
        const int64_t used = shape.steps(size);
        kernels.pack_moments({rows, size, channels, panels, used, 0, shift, table});
        kernels.moments({panels, channels, panels, channels, used, true, products, products + channels * width});
      }
    });
    split.add_parts(parts, part_size);
    const double n = static_cast<double>(count);
    double* const sums = parts + channels * width;
    double* const to = data<double>(cov);
    for (int64_t i = 0; i < channels; ++i) {
      data<double>(mean)[i] = (shift ? static_cast<double>(shift[i]) : 0.0) + sums[i] / n;
    }
    for (int64_t i = 0; i < channels; ++i) {
      for (int64_t j = i; j < channels; ++j) {
        to[i * channels + j] = to[j * channels + i] = parts[i * width + j] - sums[i] * (sums[j] / n);
      }
    }
  });
  return {mean, cov};
}

// What products over all pixels are kept in, once they are summed.
template <class T>
using Product = std::conditional_t<sizeof(T) == 2, float, double>;

// g^T y over the rows, transposed at the end; sums of g beside it.
template <class T>
void reduce_products(
    const T* g,
    const uint16_t* mask,
    int64_t outputs,
    const T* y,
    const Pixels& pixels,
    const OptionalTensor& norm,
    T* kept,
    bool stream,
    double* sum_g,
    Product<T>* products) {
  const auto& kernels = conv1x1_kernels<T>();
  const PanelShape& shape = kernels.shape;
  const int64_t channels = y ? pixels.channels() : 0, count = pixels.count(), width = padded(outputs);
  const Split split(count, kReduceRows, (channels + 1) * width);
  const int64_t part_size = (channels + 1) * width;
  Scratch& scratch = Scratch::with(sizeof(double) * (split.parts * part_size + channels + norm_size(channels)));
  double* const parts = scratch.take<double>(split.parts * part_size);
  const auto* const table = norm_table<T>(norm, channels, scratch);
  const auto* const shift = y ? shift_of(y, pixels, table, scratch) : nullptr;
  for_each_task(split.parts, count * outputs, [&](int64_t part) {
    const int64_t steps = shape.steps(kReduceRows);
    const int64_t bytes_y = panel_bytes(shape, channels, steps), bytes_g = panel_bytes(shape, outputs, steps);
    // Rows that do not begin with a word of the mask are masked before they are packed.
    const int64_t block = mask && outputs % kLanes ? kReduceRows * outputs : 0;
    Scratch& mine = Scratch::with<Scratch::Task>(bytes_y + bytes_g + block * sizeof(T) + kReduceRows * sizeof(T*));
    void* const panels_y = mine.take<char>(bytes_y);
    void* const panels_g = mine.take<char>(bytes_g);
    T* const masked = mine.take<T>(block);
    const T** const rows = mine.take<const T*>(kReduceRows);
    double* const to = parts + part * part_size;
    std::fill(to, to + part_size, 0.0);
    const int64_t end = std::min((part + 1) * split.rows, count);
    for (int64_t row = part * split.rows; row < end; row += kReduceRows) {
      const int64_t size = std::min(kReduceRows, end - row), used = shape.steps(size);
      const T* from = g + row * outputs;
      // A block begins with a whole word of the mask: its rows are a multiple of kLanes.
      const uint16_t* words = mask ? mask + row * outputs / kLanes : nullptr;
      if (block) {
        add_act_kernels<T>().mask_gradient({from, words, masked, false}, 0, size * outputs);
        if (kept) std::copy(masked, masked + size * outputs, kept + row * outputs);
        from = masked;
      }
      for (int64_t r = 0; r < size; ++r) rows[r] = from + r * outputs;
      kernels.pack(
          {rows,
           size,
           outputs,
           panels_g,
           used,
           0,
           nullptr,
           nullptr,
           block ? nullptr : words,
           kept ? kept + row * outputs : nullptr,
           stream});
      if (y) {
        point_at<T>(y, pixels, row, size, rows);
        kernels.pack({rows, size, channels, panels_y, used, 0, shift, table});
      }
      const int64_t next = std::min(row + kReduceRows, end), next_size = std::min(kReduceRows, end - next);
      kernels.products(
          {panels_y,
           channels,
           panels_g,
           outputs,
           used,
           false,
           to,
           to + channels * width,
           g + next * outputs,
           next_size * outputs * static_cast<int64_t>(sizeof(T))});
    }
  });
  split.add_parts(parts, part_size);
  const double* const sums = parts + channels * width;
  if (sum_g) std::copy(sums, sums + outputs, sum_g);
  for (int64_t k = 0; k < outputs; ++k) {
    for (int64_t c = 0; c < channels; ++c) {
      const double product = parts[c * width + k] + (shift ? static_cast<double>(shift[c]) * sums[k] : 0.0);
      products[k * channels + c] = static_cast<Product<T> >(product);
    }
  }
}

std::tuple<Tensor, Tensor, Tensor, Tensor> conv1x1_bn_act_backward_reduce_cpu(
    Tensor dy,
    OptionalTensor mask,
    Tensor y,
    OptionalTensor norm,
    int64_t stride,
    OptionalTensor y2,
    int64_t stride2,
    bool need_g,
    bool need_products) {
  const Pixels pixels("y", y, stride), gradient("dy", dy, 1);
  const Pixels pixels2("y2", y2 ? *y2 : y, y2 ? stride2 : stride);
  const int64_t outputs = gradient.channels();
  STD_TORCH_CHECK(
      dy.scalar_type() == y.scalar_type() && (!y2 || y2->scalar_type() == y.scalar_type()),
      "dy, y and y2 must have one dtype");
  STD_TORCH_CHECK(
      gradient.count() == pixels.count() && pixels2.count() == pixels.count(), "dy must have the pixels of the output");
  check_normalisation(norm, pixels, y);
  if (mask) check_mask(*mask, dy, mask_bytes(gradient.layout));
  STD_TORCH_CHECK(mask || !need_g, "without a mask g is dy");
  Tensor g = wanted_like(need_g, dy);
  Tensor sum_g = empty_vector(outputs, ScalarType::Double, dy);
  const auto matrix_or_none = [&](bool wanted, const Pixels& of) {
    const ScalarType dtype = dy.element_size() > 2 ? ScalarType::Double : ScalarType::Float;
    return wanted ? empty_matrix(outputs, of.channels(), dtype, dy) : empty_vector(0, dtype, dy);
  };
  Tensor products = matrix_or_none(need_products, pixels);
  Tensor products2 = matrix_or_none(need_products && y2, pixels2);
  dispatch(y.scalar_type(), [&]<class T>(T*) {
    reduce_products<T>(
        data<T>(dy),
        data<uint16_t>(mask),
        outputs,
        need_products ? data<T>(y) : nullptr,
        pixels,
        need_products ? norm : std::nullopt,
        need_g ? data<T>(g) : nullptr,
        streams<T>(dy.numel()) && outputs % (2 * kLanes) == 0,
        data<double>(sum_g),
        need_products ? data<Product<T> >(products) : nullptr);
    if (!need_products || !y2) return;
    const Tensor& from = need_g ? g : dy;
    reduce_products<T>(
        data<T>(from),
        need_g ? nullptr : data<uint16_t>(mask),
        outputs,
        data<T>(*y2),
        pixels2,
        std::nullopt,
        nullptr,
        false,
        nullptr,
        data<Product<T> >(products2));
  });
  return {g, sum_g, products, products2};
}

// ---- products per row ----

// One or two matrices with rows of their own, multiplied by the panels of a stacked matrix.
template <class T>
struct Source {
  const T* data = nullptr;
  const Pixels* pixels = nullptr;
  const uint16_t* mask = nullptr;
  int64_t width = 0;
  const typename ScalarOf<T>::type* shift = nullptr;  // subtracted from every row
  const typename ScalarOf<T>::type* norm = nullptr;   // the table, if the rows are to be normalised
};

// What is made of the products of a row.
template <class T>
struct Epilogue {
  const T* residual = nullptr;
  const uint16_t* residual_mask = nullptr;
  uint16_t* mask = nullptr;
  bool relu = false;
  // Or null: out becomes zero where the second source's activation is, and here are, for each part of the rows, the
  // sums of out and of out * (x - mean), in whole vectors of columns.
  double* sums = nullptr;
  // Or null: for each part of the rows and each column its moments; whole vectors of columns then.
  Moments* moments = nullptr;
};

// Tasks of some blocks; where they have sums, not many.
Split product_split(int64_t count, int64_t columns, bool sums) {
  const int64_t blocks = std::max<int64_t>(1, 64 * 1024 / (kApplyRows * columns));
  const int64_t tasks = ceil_div(ceil_div(count, kApplyRows), blocks);
  return sums ? Split(count, kApplyRows, 2 * padded(columns), std::min<int64_t>(tasks, 256))
              : Split(count, kApplyRows, 1, tasks);
}

// Scratch that multiply_all takes for panels of `steps` steps.
int64_t product_bytes(const PanelShape& shape, int64_t columns, int64_t steps) {
  return panel_bytes(shape, columns, steps) + shape.panels(columns) * shape.columns * sizeof(double);
}

// out = epilogue(a1 b1 + a2 b2) for every row; b1 and b2 are given by their rows.
template <class T>
void multiply_all(
    const Source<T> (&sources)[2],
    const T* const* b1,
    const T* const* b2,
    const typename ScalarOf<T>::type* shift,
    int64_t columns,
    T* out,
    const Pixels& target,
    const Split& split,
    const Epilogue<T>& epilogue,
    Scratch& scratch) {
  using S = typename ScalarOf<T>::type;
  const auto& kernels = conv1x1_kernels<T>();
  const PanelShape& shape = kernels.shape;
  const int64_t steps[] = {shape.steps(sources[0].width), sources[1].data ? shape.steps(sources[1].width) : 0};
  const int64_t panel_steps = steps[0] + steps[1];
  char* const panels = scratch.take<char>(panel_bytes(shape, columns, panel_steps));
  kernels.pack({b1, sources[0].width, columns, panels, panel_steps, 0});
  if (steps[1]) {
    kernels.pack({b2, sources[1].width, columns, panels, panel_steps, steps[0]});
  }
  S* const padded_shift = scratch.take<S>(shape.panels(columns) * shape.columns);
  std::copy(shift, shift + columns, padded_shift);
  std::fill(padded_shift + columns, padded_shift + shape.panels(columns) * shape.columns, S(0));

  const int64_t count = target.count();
  const auto [residual, residual_mask, mask, relu, sums, moments] = epilogue;
  const bool whole_words = columns % kLanes == 0;
  const bool words = mask && relu && whole_words;
  const bool stream = !moments && streams<T>(count * columns) && columns % (2 * kLanes) == 0;
  // The rows of a block are a multiple of kLanes, so that its mask is of whole words.
  for_each_task(split.parts, count * columns, [&](int64_t task) {
    const int64_t block = kApplyRows * columns;
    int64_t bytes = block * sizeof(T);
    for (int s = 0; s < 2; ++s) {
      bytes += kApplyRows * (steps[s] * shape.element_size + 64 + (sources[s].mask ? sources[s].width * sizeof(T) : 0));
    }
    const int64_t measured = moments ? columns : 0;
    Scratch& mine =
        Scratch::with<Scratch::Task>(bytes + 5 * kApplyRows * sizeof(void*) + 2 * measured * sizeof(double));
    double* const mean = mine.take<double>(measured);
    double* const m2 = mine.take<double>(measured);
    Moments* const task_moments = moments + task * measured;
    std::fill(task_moments, task_moments + measured, Moments());
    const void** const operands[] = {mine.take<const void*>(kApplyRows), mine.take<const void*>(kApplyRows)};
    const T** const rows = mine.take<const T*>(kApplyRows);
    T** const to = mine.take<T*>(kApplyRows);
    T* const masked_residual = residual_mask && !whole_words ? mine.take<T>(block) : nullptr;
    double* const task_sums = sums ? sums + task * 2 * padded(columns) : nullptr;
    if (sums) std::fill(task_sums, task_sums + 2 * padded(columns), 0.0);
    T* masked[2];
    char* widened[2];
    const int64_t row_bytes[] = {
        ceil_div(steps[0] * shape.element_size, 64) * 64, ceil_div(steps[1] * shape.element_size, 64) * 64};
    for (int s = 0; s < 2; ++s) {
      masked[s] = sources[s].mask ? mine.take<T>(kApplyRows * sources[s].width) : nullptr;
      widened[s] = mine.take<char>(kApplyRows * row_bytes[s]);
    }
    const int64_t end = std::min((task + 1) * split.rows, count);
    for (int64_t row = task * split.rows; row < end; row += kApplyRows) {
      const int64_t size = std::min(kApplyRows, end - row);
      const T* next[] = {nullptr, nullptr};
      for (int s = 0; s < 2; ++s) {
        const Source<T>& source = sources[s];
        if (!source.data) continue;
        if (source.mask) {
          const int64_t begin = row * source.width;
          add_act_kernels<T>().mask_gradient(
              {source.data + begin, source.mask + begin / kLanes, masked[s], false}, 0, size * source.width);
        }
        const bool widens = !kernels.direct || source.width % shape.rows || source.shift || source.norm;
        for (int64_t r = 0; r < size; ++r) {
          rows[r] = source.mask ? masked[s] + r * source.width : source.data + source.pixels->at(row + r);
          operands[s][r] = widens ? widened[s] + r * row_bytes[s] : static_cast<const void*>(rows[r]);
        }
        if (widens) {
          kernels.widen({rows, size, source.width, widened[s], row_bytes[s], source.shift, source.norm});
        }
        const bool adjacent = source.pixels->stride == 1;
        if ((widens || source.mask) && adjacent && row + kApplyRows + size <= count) {
          next[s] = source.data + (row + kApplyRows) * source.width;
        }
      }
      const T* add = residual ? residual + row * columns : nullptr;
      const uint16_t* const add_words = residual_mask ? residual_mask + row * columns / kLanes : nullptr;
      if (masked_residual) {
        add_act_kernels<T>().mask_gradient({add, add_words, masked_residual, false}, 0, size * columns);
        add = masked_residual;
      }
      for (int64_t r = 0; r < size; ++r) {
        to[r] = out + target.at(row + r);
        if (add) rows[r] = add + r * columns;
      }
      kernels.multiply(
          {size,
           columns,
           operands[0],
           steps[0],
           operands[1],
           steps[1],
           panels,
           padded_shift,
           add ? rows : nullptr,
           masked_residual ? nullptr : add_words,
           to,
           words ? mask + row * columns / kLanes : nullptr,
           relu,
           stream,
           sums ? sources[1].data + row * columns : nullptr,
           sources[1].norm,
           task_sums,
           next[0],
           next[1],
           sources[0].width,
           sources[1].width});
      if (mask && !words) kernels.mask_of(out + row * columns, size * columns, mask + row * columns / kLanes);
      if (moments) {
        const bool in_double = count * columns <= kDoubleElements;
        batch_norm_kernels<T>().statistics_rows(
            out, {count, columns, 0}, {row, row + size, 0, columns}, in_double, mean, m2);
        for (int64_t c = 0; c < columns; ++c) task_moments[c].add(static_cast<double>(size), mean[c], m2[c]);
      }
    }
  });
}

// The columns of a matrix (columns, inner), each contiguous.
template <class T>
const T** transposed_rows(const T* matrix, int64_t columns, int64_t inner, Scratch& scratch) {
  T* const transposed = scratch.take<T>(inner * columns);
  const T** const rows = scratch.take<const T*>(inner);
  for (int64_t c = 0; c < inner; ++c) {
    rows[c] = transposed + c * columns;
    for (int64_t k = 0; k < columns; ++k) transposed[c * columns + k] = matrix[k * inner + c];
  }
  return rows;
}

std::tuple<Tensor, Tensor> conv1x1_bn_act_apply_cpu(
    Tensor y,
    OptionalTensor norm,
    Tensor folded,
    Tensor shift,
    int64_t stride,
    OptionalTensor y2,
    OptionalTensor folded2,
    int64_t stride2,
    OptionalTensor residual,
    OptionalTensor residual_mask,
    bool relu,
    bool save_mask) {
  const Pixels pixels("y", y, stride);
  check_normalisation(norm, pixels, y);
  const Pixels pixels2("y2", y2 ? *y2 : y, y2 ? stride2 : stride);
  const ScalarType dtype = y.scalar_type();
  const int64_t columns = folded.size(0), channels = pixels.channels(), channels2 = pixels2.channels();
  check_matrix("folded", folded, columns, channels, dtype);
  check_shift("shift", shift, columns, y);
  STD_TORCH_CHECK(!y2 == !folded2 && !(y2 && residual), "y2 goes with folded2 and without residual");
  if (y2) {
    STD_TORCH_CHECK(y2->scalar_type() == dtype, "y2 must have the dtype of y");
    STD_TORCH_CHECK(
        pixels2.layout.batch == pixels.layout.batch && pixels2.height == pixels.height && pixels2.width == pixels.width,
        "y2 must give the pixels that y gives");
    check_matrix("folded2", *folded2, columns, channels2, dtype);
  }
  const Layout4d layout{pixels.layout.batch, columns, pixels.height, pixels.width, true};
  const int64_t sizes[] = {layout.batch, columns, layout.height, layout.width};
  Tensor out = empty_strided(sizes, layout.strides().data(), 4, dtype, y);
  if (residual) check_same_layout("residual", *residual, out);
  STD_TORCH_CHECK(residual || !residual_mask, "residual_mask goes with residual");
  if (residual_mask) check_mask(*residual_mask, out, mask_bytes(layout));
  Tensor mask = empty_vector(save_mask ? mask_bytes(layout) : 0, ScalarType::Byte, y);
  const Pixels target("out", out, 1);
  dispatch(dtype, [&]<class T>(T*) {
    const PanelShape& shape = conv1x1_kernels<T>().shape;
    const int64_t inner[] = {channels, y2 ? channels2 : 0};
    Scratch& scratch = Scratch::with(
        product_bytes(shape, columns, shape.steps(inner[0]) + shape.steps(inner[1])) +
        norm_size(channels) * sizeof(double) + (inner[0] + inner[1]) * (columns * sizeof(T) + sizeof(T*)));
    const T** rows[2];
    const T* const matrices[] = {data<T>(folded), data<T>(folded2)};
    for (int s = 0; s < 2; ++s) rows[s] = transposed_rows(matrices[s], columns, inner[s], scratch);
    const Source<T> sources[2] = {
        {data<T>(y), &pixels, nullptr, channels, nullptr, norm_table<T>(norm, channels, scratch)},
        {data<T>(y2), &pixels2, nullptr, y2 ? channels2 : 0}};
    using S = typename ScalarOf<T>::type;
    multiply_all<T>(
        sources,
        rows[0],
        rows[1],
        data<S>(shift),
        columns,
        data<T>(out),
        target,
        product_split(target.count(), columns, false),
        {data<T>(residual), data<uint16_t>(residual_mask), save_mask ? data<uint16_t>(mask) : nullptr, relu},
        scratch);
  });
  return {out, mask};
}

std::tuple<Tensor, Tensor> conv1x1_statistics_cpu(Tensor x, Tensor weight) {
  const Pixels pixels("x", x, 1);
  const ScalarType dtype = x.scalar_type();
  const int64_t channels = pixels.channels(), columns = weight.size(0), count = pixels.count();
  check_matrix("weight", weight, columns, channels, dtype);
  const Layout4d layout{pixels.layout.batch, columns, pixels.height, pixels.width, true};
  const int64_t sizes[] = {layout.batch, columns, layout.height, layout.width};
  Tensor out = empty_strided(sizes, layout.strides().data(), 4, dtype, x);
  const bool whole = columns % kLanes == 0;
  Tensor partial = empty_vector(whole ? 2 * columns + 1 : 0, ScalarType::Double, x);
  const Pixels target("out", out, 1);
  dispatch(dtype, [&]<class T>(T*) {
    using S = typename ScalarOf<T>::type;
    const PanelShape& shape = conv1x1_kernels<T>().shape;
    const Split split = product_split(count, columns, true);
    const int64_t measured = whole ? split.parts * columns : 0;
    Scratch& scratch = Scratch::with(
        product_bytes(shape, columns, shape.steps(channels)) + measured * sizeof(Moments) + columns * sizeof(S) +
        channels * (columns * sizeof(T) + sizeof(T*)));
    Moments* const moments = scratch.take<Moments>(measured);
    S* const no_shift = scratch.take<S>(columns);
    std::fill(no_shift, no_shift + columns, S(0));
    const T** const rows = transposed_rows(data<T>(weight), columns, channels, scratch);
    const Source<T> sources[2] = {{data<T>(x), &pixels, nullptr, channels}, {}};
    Epilogue<T> epilogue;
    epilogue.moments = whole ? moments : nullptr;
    multiply_all<T>(sources, rows, nullptr, no_shift, columns, data<T>(out), target, split, epilogue, scratch);
    for (int64_t c = 0; whole && c < columns; ++c) {
      Moments merged;
      for (int64_t part = 0; part < split.parts; ++part) merged.add(moments[part * columns + c]);
      data<double>(partial)[c] = merged.mean();
      data<double>(partial)[columns + c] = merged.m2();
    }
    if (whole) data<double>(partial)[2 * columns] = static_cast<double>(count);
  });
  if (!whole) partial = batch_norm_statistics_cpu(out);  // rows do not begin with vectors
  return {out, partial};
}

// dy folded + y mixing + offset at the pixels of y that the convolution took, zero elsewhere; its sums where y is
// normalised.
std::tuple<Tensor, Tensor> input_gradient(
    const Tensor& dy,
    const OptionalTensor& mask,
    const Pixels& gradient,
    const Tensor& y,
    const Pixels& pixels,
    const OptionalTensor& norm,
    const Tensor& folded,
    const Tensor& mixing,
    const Tensor& offset) {
  const int64_t outputs = gradient.channels(), channels = pixels.channels();
  STD_TORCH_CHECK(y.scalar_type() == dy.scalar_type(), "dy and y must have one dtype");
  STD_TORCH_CHECK(
      gradient.layout.batch == pixels.layout.batch && gradient.height == pixels.height &&
          gradient.width == pixels.width,
      "dy must have the pixels of the output");
  check_matrix("folded", folded, outputs, channels, y.scalar_type());
  check_matrix("mixing", mixing, channels, channels, y.scalar_type());
  check_shift("offset", offset, channels, y);
  Tensor dx = uninitialized_like(y);
  Tensor sums = norm ? empty_matrix(2, channels, ScalarType::Double, y) : empty_vector(0, ScalarType::Double, y);
  dispatch(y.scalar_type(), [&]<class T>(T*) {
    if (pixels.stride > 1) std::memset(dx.data_ptr(), 0, dx.numel() * sizeof(T));
    const PanelShape& shape = conv1x1_kernels<T>().shape;
    const Split split = product_split(pixels.count(), channels, norm.has_value());
    const int64_t part_size = norm ? 2 * padded(channels) : 0;
    Scratch& scratch = Scratch::with(
        product_bytes(shape, channels, shape.steps(outputs) + shape.steps(channels)) +
        (outputs + channels) * sizeof(T*) +
        (2 * channels + norm_size(channels) + split.parts * part_size) * sizeof(double));
    using S = typename ScalarOf<T>::type;
    const T** const rows = scratch.take<const T*>(outputs);
    const T** const rows2 = scratch.take<const T*>(channels);
    for (int64_t k = 0; k < outputs; ++k) rows[k] = data<T>(folded) + k * channels;
    for (int64_t c = 0; c < channels; ++c) rows2[c] = data<T>(mixing) + c * channels;
    // y mixing and offset nearly cancel where the mean is large: y mixing = (y - shift) mixing + shift mixing
    const S* const table = norm_table<T>(norm, channels, scratch);
    const S* const shift = shift_of(data<T>(y), pixels, table, scratch);
    S* const rest = scratch.take<S>(channels);
    for (int64_t j = 0; j < channels; ++j) {
      double sum = data<S>(offset)[j];
      if constexpr (sizeof(T) >= 4) {
        for (int64_t c = 0; c < channels; ++c) sum += static_cast<double>(shift[c]) * static_cast<double>(rows2[c][j]);
      }
      rest[j] = static_cast<S>(sum);
    }
    const Source<T> sources[2] = {
        {data<T>(dy), &gradient, data<uint16_t>(mask), outputs, nullptr},
        {data<T>(y), &pixels, nullptr, channels, shift, table}};
    Epilogue<T> epilogue;
    if (norm) epilogue.sums = scratch.take<double>(split.parts * part_size);
    multiply_all<T>(sources, rows, rows2, rest, channels, data<T>(dx), pixels, split, epilogue, scratch);
    if (!norm) return;
    split.add_parts(epilogue.sums, part_size);
    for (int64_t i = 0; i < 2; ++i) {
      std::copy_n(epilogue.sums + i * padded(channels), channels, data<double>(sums) + i * channels);
    }
  });
  return {dx, sums};
}

std::tuple<Tensor, Tensor, Tensor> conv1x1_bn_act_backward_apply_cpu(
    Tensor dy,
    OptionalTensor mask,
    Tensor y,
    OptionalTensor norm,
    Tensor folded,
    Tensor mixing,
    Tensor offset,
    int64_t stride,
    OptionalTensor y2,
    OptionalTensor folded2,
    OptionalTensor mixing2,
    OptionalTensor offset2,
    int64_t stride2,
    bool need_dx,
    bool need_dx2) {
  const Pixels pixels("y", y, stride), gradient("dy", dy, 1);
  check_normalisation(norm, pixels, y);
  if (mask) check_mask(*mask, dy, mask_bytes(gradient.layout));
  STD_TORCH_CHECK(!need_dx2 || (y2 && folded2 && mixing2 && offset2), "dx2 takes y2, folded2, mixing2 and offset2");
  Tensor dx = empty_vector(0, y.scalar_type(), y), dx2 = empty_vector(0, y.scalar_type(), y);
  Tensor sums = empty_vector(0, ScalarType::Double, y);
  if (need_dx) std::tie(dx, sums) = input_gradient(dy, mask, gradient, y, pixels, norm, folded, mixing, offset);
  if (need_dx2) {
    const Pixels pixels2("y2", *y2, stride2);
    dx2 = std::get<0>(input_gradient(dy, mask, gradient, *y2, pixels2, std::nullopt, *folded2, *mixing2, *offset2));
  }
  return {dx, dx2, sums};
}

}  // namespace
}  // namespace fusedres::cpu

STABLE_TORCH_LIBRARY_IMPL(fusedres, CPU, m) {
  m.impl("conv1x1_moments", TORCH_BOX(&fusedres::cpu::conv1x1_moments_cpu));
  m.impl("conv1x1_statistics", TORCH_BOX(&fusedres::cpu::conv1x1_statistics_cpu));
  m.impl("conv1x1_bn_act_apply", TORCH_BOX(&fusedres::cpu::conv1x1_bn_act_apply_cpu));
  m.impl("conv1x1_bn_act_backward_reduce", TORCH_BOX(&fusedres::cpu::conv1x1_bn_act_backward_reduce_cpu));
  m.impl("conv1x1_bn_act_backward_apply", TORCH_BOX(&fusedres::cpu::conv1x1_bn_act_backward_apply_cpu));
}

#endif
