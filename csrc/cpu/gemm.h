// Small matrix products in registers: a tile of rows and vectors of columns is accumulated over the inner dimension
// from a packed panel (see conv1x1_kernels.h) and from elements that are broadcast.
#pragma once

#include "traverse.h"

namespace fusedres::cpu {
namespace {

// What one multiplication takes and gives, and the tile that fits the registers.
struct Floats {
  using Element = float;
  using Vec = F32;
  static constexpr Element kOne = 1;
  static constexpr int64_t kChain = 32;  // products summed one after another: roundings grow with them
  static constexpr int kRows = 1;        // of the matrix in one element
#if defined(FUSEDRES_VEC_AVX512)
  static constexpr int kHeight = 6, kVectors = 4;
#elif defined(FUSEDRES_VEC_AVX2)
  static constexpr int kHeight = 6, kVectors = 1;
#else
  static constexpr int kHeight = 2, kVectors = 1;
#endif
  static FUSEDRES_INLINE Vec zero() { return broadcast(float(0)); }
  static FUSEDRES_INLINE Vec load_panel(const Element* p) { return load(p); }
  static FUSEDRES_INLINE Vec multiply_add(Element a, Vec b, Vec sum) { return fma(broadcast(a), b, sum); }
};

struct Doubles {
  using Element = double;
  using Vec = F64;
  static constexpr Element kOne = 1;
  static constexpr int64_t kChain = INT64_MAX;
  static constexpr int kRows = 1;
#if defined(FUSEDRES_VEC_AVX512)
  static constexpr int kHeight = 6, kVectors = 2;
#elif defined(FUSEDRES_VEC_AVX2)
  static constexpr int kHeight = 2, kVectors = 1;
#else
  static constexpr int kHeight = 1, kVectors = 1;
#endif
  static FUSEDRES_INLINE Vec zero() { return broadcast(double(0)); }
  static FUSEDRES_INLINE Vec load_panel(const Element* p) { return load(p); }
  static FUSEDRES_INLINE Vec multiply_add(Element a, Vec b, Vec sum) {
#if defined(FUSEDRES_VEC_AVX512)
    for (int i = 0; i < Vec::kParts; ++i) sum.v[i] = _mm512_fmadd_pd(_mm512_set1_pd(a), b.v[i], sum.v[i]);
    return sum;
#elif defined(FUSEDRES_VEC_AVX2)
    for (int i = 0; i < Vec::kParts; ++i) sum.v[i] = _mm256_fmadd_pd(_mm256_set1_pd(a), b.v[i], sum.v[i]);
    return sum;
#else
    return fma(broadcast(a), b, sum);
#endif
  }
};

#if defined(FUSEDRES_VEC_AVX512)
// Two bfloat16, the first in the low half: what vdpbf16ps multiplies and adds.
struct Pairs {
  using Element = uint32_t;
  using Vec = F32;
  static constexpr Element kOne = 0x3f803f80;
  static constexpr int64_t kChain = INT64_MAX;
  static constexpr int kRows = 2;
  static constexpr int kHeight = 6, kVectors = 4;
  struct Panel {
    __m512i v;
  };
  static FUSEDRES_INLINE Vec zero() { return broadcast(0.0f); }
  static FUSEDRES_INLINE Panel load_panel(const Element* p) { return {_mm512_loadu_si512(p)}; }
  static FUSEDRES_INLINE Vec multiply_add(Element a, Panel b, Vec sum) {
    return {_mm512_dpbf16_ps(sum.v, (__m512bh)_mm512_set1_epi32(static_cast<int>(a)), (__m512bh)b.v)};
  }
};
template <class T>
using Operand =
    std::conditional_t<std::is_same_v<T, double>, Doubles, std::conditional_t<std::is_same_v<T, bf16>, Pairs, Floats>>;
#else
template <class T>
using Operand = std::conditional_t<std::is_same_v<T, double>, Doubles, Floats>;
#endif

// Of the second moments: those of float in double.
template <class T>
using MomentsOperand = std::conditional_t<sizeof(T) >= 4, Doubles, Operand<T>>;

template <class M>
constexpr int kPanelColumns = M::kVectors * kLanes;

struct NoPrefetch {
  FUSEDRES_INLINE void operator()(int64_t) const {}
};

// sums[u][v] += a[u][s * a_step] * panel[s][v] over `steps` steps. prefetch(s) brings near what is read later: spread
// over the steps, for a burst would fill the queues that the loads of the tile need.
template <class M, int kHeight, int kVectors, class Prefetch = NoPrefetch>
FUSEDRES_INLINE void multiply_tile(
    const typename M::Element* const (&a)[kHeight],
    int64_t a_step,
    const typename M::Element* panel,
    int64_t steps,
    typename M::Vec (&sums)[kHeight][kVectors],
    const Prefetch& prefetch = {}) {
  for (int64_t s = 0; s < steps; ++s) {
    prefetch(s);
    decltype(M::load_panel(panel)) b[kVectors];
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) b[v] = M::load_panel(panel + s * kPanelColumns<M> + v * kLanes);
#pragma GCC unroll 8
    for (int u = 0; u < kHeight; ++u) {
      typename M::Element value;
      std::memcpy(&value, a[u] + s * a_step, sizeof value);  // two bfloat16 need not be aligned
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) sums[u][v] = M::multiply_add(value, b[v], sums[u][v]);
    }
  }
}

// Calls f with the number of vectors that `columns` take in a panel, as a constant.
template <class M, int kVectors = M::kVectors, class F>
FUSEDRES_INLINE void with_vectors(int64_t columns, const F& f) {
  if constexpr (kVectors > 1) {
    if (columns <= (kVectors - 1) * kLanes) return with_vectors<M, kVectors - 1>(columns, f);
  }
  f(std::integral_constant<int, kVectors>());
}

// ---- packing ----

// Before the ReLU, of columns with the parameters p: in batch_norm_act's words, and so with its bits.
template <class P, class V>
FUSEDRES_INLINE V normalised(const P& p, V x) {
  using Slot = Slots<false>;
  return fma(x - p[Slot::mean], p[Slot::scale], p[Slot::shift]);
}

// The activation, before it is rounded to T.
template <class T, class P, class V>
FUSEDRES_INLINE V activated(const P& p, V x) {
  const V v = normalised(p, x);
  return keep(positive<T>(v), v);
}

template <class S>
FUSEDRES_INLINE auto norm_params(const S* table, int64_t c) {
  return column_params<Slots<false>::forward>(table, c);
}

enum class Packing { plain, masked, normalised };

// n values of row r from column c on: what the mask keeps of them, or their activation; see PackArgs.
template <Packing kPacking, class T>
FUSEDRES_INLINE auto pack_load(const PackArgs<T>& a, int64_t r, int64_t c, int n) {
  auto v = n == kLanes ? load(a.rows[r] + c) : load_n(a.rows[r] + c, n);
  if constexpr (kPacking == Packing::normalised) v = rounded<T>(activated<T>(norm_params(a.norm, c), v));
  if constexpr (kPacking == Packing::masked) {
    v = keep(mask_from_bits(a.mask[(r * a.width + c) / kLanes], v), v);
    if (a.g) a.stream ? stream(a.g + r * a.width + c, v) : store(a.g + r * a.width + c, v);
  }
  return v;
}

template <Packing kPacking, class T>
FUSEDRES_INLINE void pack_vector(float* to, const PackArgs<T>& a, int64_t r, int64_t c, int n) {
  const auto v = pack_load<kPacking>(a, r, c, n);
  store(to, a.shift ? v - load_n(a.shift + c, n) : v);
}

template <Packing kPacking, class T>
FUSEDRES_INLINE void pack_vector(double* to, const PackArgs<T>& a, int64_t r, int64_t c, int n) {
  const F64 v = to_double(pack_load<kPacking>(a, r, c, n));
  store(to, a.shift ? v - to_double(load_n(a.shift + c, n)) : v);
}

#if defined(FUSEDRES_VEC_AVX512)
template <Packing kPacking>
FUSEDRES_INLINE __m512i pack_load_pair(const PackArgs<bf16>& a, int64_t r, int64_t c, int n) {
  if (r >= a.count) return _mm512_setzero_si512();
  __m256i v = _mm256_maskz_loadu_epi16(first(n), a.rows[r] + c);
  if constexpr (kPacking == Packing::masked) {
    v = _mm256_maskz_mov_epi16(a.mask[(r * a.width + c) / kLanes], v);
    if (a.g) _mm256_storeu_si256(reinterpret_cast<__m256i*>(a.g + r * a.width + c), v);
  }
  return _mm512_cvtepu16_epi32(v);
}

// The same of 2 * kLanes columns, which fill a cache line.
template <Packing kPacking>
FUSEDRES_INLINE __m512i pack_load_line(const PackArgs<bf16>& a, int64_t r, int64_t c) {
  if (r >= a.count) return _mm512_setzero_si512();
  __m512i v = _mm512_loadu_si512(a.rows[r] + c);
  if constexpr (kPacking == Packing::masked) {
    uint32_t bits;
    std::memcpy(&bits, a.mask + (r * a.width + c) / kLanes, sizeof bits);
    asm("" : "+v"(v));  // see keep()
    v = _mm512_maskz_mov_epi16(bits, v);
    if (a.g) {
      auto* const to = reinterpret_cast<__m512i*>(a.g + r * a.width + c);
      a.stream ? _mm512_stream_si512(to, v) : _mm512_storeu_si512(to, v);
    }
  }
  return v;
}
template <Packing kPacking>
FUSEDRES_INLINE void pack_line(uint32_t* to, const PackArgs<bf16>& a, int64_t r, int64_t c) {
  const __m512i low = pack_load_line<kPacking>(a, r, c), high = pack_load_line<kPacking>(a, r + 1, c);
  const auto interleave = [](__m256i x, __m256i y) {
    return _mm512_or_si512(_mm512_cvtepu16_epi32(x), _mm512_slli_epi32(_mm512_cvtepu16_epi32(y), 16));
  };
  _mm512_storeu_si512(to, interleave(_mm512_castsi512_si256(low), _mm512_castsi512_si256(high)));
  _mm512_storeu_si512(to + kLanes, interleave(_mm512_extracti64x4_epi64(low, 1), _mm512_extracti64x4_epi64(high, 1)));
}

// Elements of two rows.
FUSEDRES_INLINE __m512i interleave(F32 row, F32 next) {
  const __m512i lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  const __m512i order =
      _mm512_add_epi32(_mm512_mullo_epi32(lanes, _mm512_set1_epi32(0x10001)), _mm512_set1_epi32(kLanes << 16));
  return _mm512_permutexvar_epi16(order, narrow(static_cast<const bf16*>(nullptr), row, next));
}

template <Packing kPacking>
FUSEDRES_INLINE void pack_vector(uint32_t* to, const PackArgs<bf16>& a, int64_t r, int64_t c, int n) {
  if constexpr (kPacking == Packing::normalised) {
    const auto p = norm_params(a.norm, c);
    const auto of_row = [&](int64_t row) {
      if (row >= a.count) return broadcast(0.0f);
      return activated<bf16>(p, n == kLanes ? load(a.rows[row] + c) : load_n(a.rows[row] + c, n));
    };
    _mm512_storeu_si512(to, interleave(of_row(r), of_row(r + 1)));
  } else {
    const __m512i low = pack_load_pair<kPacking>(a, r, c, n), high = pack_load_pair<kPacking>(a, r + 1, c, n);
    _mm512_storeu_si512(to, _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
  }
}
#endif

template <class T, class M, Packing kPacking>
FUSEDRES_INLINE void pack_rows(const PackArgs<T>& a) {
  using Element = typename M::Element;
  constexpr int64_t kColumns = kPanelColumns<M>;
  constexpr Packing kOfParts = kPacking == Packing::masked ? Packing::plain : kPacking;  // width is of whole vectors
  const int64_t end = (a.width + kColumns - 1) / kColumns * kColumns;
  Element* row = static_cast<Element*>(a.panels) + a.first_step * kColumns;
  for (int64_t r = 0; r < a.count; r += M::kRows, row += kColumns) {
    int64_t c = 0;
    const auto at = [&] { return row + c / kColumns * a.panel_steps * kColumns + c % kColumns; };
#if defined(FUSEDRES_VEC_AVX512)
    if constexpr (std::is_same_v<M, Pairs> && kPacking != Packing::normalised) {
      for (; c + 2 * kLanes <= a.width; c += 2 * kLanes) pack_line<kPacking>(at(), a, r, c);
    }
#endif
    for (; c < end; c += kLanes) {
      Element* const to = at();
      if (c + kLanes <= a.width) {
        pack_vector<kPacking>(to, a, r, c, kLanes);
      } else if (c < a.width) {
        pack_vector<kOfParts>(to, a, r, c, static_cast<int>(a.width - c));
      } else {
        std::memset(to, 0, kLanes * sizeof(Element));
      }
    }
  }
}

template <class T, class M>
void pack(const PackArgs<T>& a) {
  if (a.norm) return pack_rows<T, M, Packing::normalised>(a);
  if (!a.mask) return pack_rows<T, M, Packing::plain>(a);
  pack_rows<T, M, Packing::masked>(a);
  finish_streams(a.stream);
}

// ---- products of columns ----

template <class M, int kHeight, int kVectors>
FUSEDRES_INLINE void products_tile(
    const ProductsArgs& a, const typename M::Element* right, int64_t c0, int64_t i0, int64_t width, const char*& next) {
  using Element = typename M::Element;
  const Element* const left = static_cast<const Element*>(a.left);
  const Element* columns[kHeight];
  for (int u = 0; u < kHeight; ++u) {
    const int64_t i = i0 + u;
    columns[u] = left + i / kPanelColumns<M> * a.steps * kPanelColumns<M> + i % kPanelColumns<M>;
  }
  typename M::Vec sums[kHeight][kVectors], total[kHeight][kVectors] = {};
  const char* const last = static_cast<const char*>(a.next) + a.next_bytes;
  for (int64_t s0 = 0; s0 < a.steps; s0 += M::kChain) {
#pragma GCC unroll 8
    for (auto& row : sums) {
#pragma GCC unroll 8
      for (auto& sum : row) sum = M::zero();
    }
    const int64_t steps = a.steps - s0 < M::kChain ? a.steps - s0 : M::kChain;
    multiply_tile<M>(columns, kPanelColumns<M>, right + s0 * kPanelColumns<M>, steps, sums, [&](int64_t s) {
      if (s % 2) return;
      __builtin_prefetch(next);
      next = next < last ? next + 64 : last;
    });
    for (int u = 0; u < kHeight; ++u) {
      columns[u] += steps * kPanelColumns<M>;
      for (int v = 0; v < kVectors; ++v) total[u][v] = total[u][v] + sums[u][v];
    }
  }
#pragma GCC unroll 8
  for (int u = 0; u < kHeight; ++u) {
    double* p = a.products + (i0 + u) * width + c0;
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) store(p + v * kLanes, load(p + v * kLanes) + to_double(total[u][v]));
  }
}

template <class M>
void products(const ProductsArgs& a) {
  using Element = typename M::Element;
  constexpr int64_t kColumns = kPanelColumns<M>;
  const int64_t width = (a.right_width + kLanes - 1) / kLanes * kLanes;
  const char* next = static_cast<const char*>(a.next);
  for (int64_t c0 = 0; c0 < width; c0 += kColumns) {
    const Element* right = static_cast<const Element*>(a.right) + c0 * a.steps;
    const int64_t columns = width - c0 < kColumns ? width - c0 : kColumns;
    const int64_t limit = c0 + columns;
    const int64_t left_width = a.symmetric && limit < a.left_width ? limit : a.left_width;
    with_vectors<M>(columns, [&]<int kVectors>(std::integral_constant<int, kVectors>) {
      int64_t i = 0;
      for (; i + M::kHeight <= left_width; i += M::kHeight) {
        products_tile<M, M::kHeight, kVectors>(a, right, c0, i, width, next);
      }
      for (; i < left_width; ++i) products_tile<M, 1, kVectors>(a, right, c0, i, width, next);
      if (!a.sums) return;
      constexpr int64_t kSumChain = 16;  // eager's sums are nearly exact
      const Element one[] = {M::kOne};
      const Element* const ones[1] = {one};
      for (int64_t s = 0; s < a.steps; s += kSumChain) {
        typename M::Vec sums[1][kVectors];
        for (auto& sum : sums[0]) sum = M::zero();
        const int64_t steps = a.steps - s < kSumChain ? a.steps - s : kSumChain;
        multiply_tile<M>(ones, 0, right + s * kColumns, steps, sums);
        for (int v = 0; v < kVectors; ++v) {
          double* p = a.sums + c0 + v * kLanes;
          store(p, load(p) + to_double(sums[0][v]));
        }
      }
    });
  }
}

}  // namespace
}  // namespace fusedres::cpu
