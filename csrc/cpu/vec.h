// Vectors of sixteen lanes on every instruction set, so that tiles, bit masks and the order of summation are the same
// everywhere. Included by the kernel half of a source, which is compiled once per instruction set; all of it is in an
// unnamed namespace, or the linker could keep one copy for all.
#pragma once

#include <cfloat>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "types.h"

#if defined(__aarch64__)
#include <arm_neon.h>
#endif

#define FUSEDRES_INLINE inline __attribute__((always_inline))

#if defined(__AVX512F__)
#define FUSEDRES_VEC_AVX512 1
#elif defined(__AVX2__)
#define FUSEDRES_VEC_AVX2 1
#endif

#if defined(FUSEDRES_VEC_AVX512) || defined(FUSEDRES_VEC_AVX2)
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // GCC bug 105593: its own _mm512_undefined_*
#endif
#include <immintrin.h>
#endif

namespace fusedres::cpu {
namespace {

// The largest value whose rounding to the storage type is zero: `!(v <= zero_below)` is the mask of a stored ReLU.
// bfloat16 flushes subnormals, as the CPU's own conversion does.
template <class T>
constexpr float zero_below = 0.0f;
template <>
constexpr float zero_below<bf16> = 0x1.fffffcp-127f;
template <>
constexpr float zero_below<half> = 0x1p-25f;

// ---- double everywhere, float on the baseline: as many of the compiler's own vectors as sixteen lanes take ----

#if defined(FUSEDRES_VEC_AVX512)
constexpr int kNativeBytes = 64;
#elif defined(FUSEDRES_VEC_AVX2)
constexpr int kNativeBytes = 32;
#else
constexpr int kNativeBytes = 16;
#endif

template <class S, class Native>
FUSEDRES_INLINE Native multiply_add(Native a, Native b, Native c) {
#if defined(__aarch64__)
  if constexpr (sizeof(S) == 4) {
    return (Native)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
  } else {
    return (Native)vfmaq_f64((float64x2_t)c, (float64x2_t)a, (float64x2_t)b);
  }
#else
  return a * b + c;
#endif
}

template <class S, class I>
struct Pack {
  typedef S Native __attribute__((vector_size(kNativeBytes)));
  typedef I Flags __attribute__((vector_size(kNativeBytes)));
  static constexpr int kParts = kLanes * static_cast<int>(sizeof(S)) / kNativeBytes;
  static constexpr int kPartLanes = kLanes / kParts;
  struct Mask {
    Flags v[kParts];
  };
  Native v[kParts];

  FUSEDRES_INLINE friend Pack operator+(Pack a, Pack b) {
    for (int i = 0; i < kParts; ++i) a.v[i] += b.v[i];
    return a;
  }
  FUSEDRES_INLINE friend Pack operator-(Pack a, Pack b) {
    for (int i = 0; i < kParts; ++i) a.v[i] -= b.v[i];
    return a;
  }
  FUSEDRES_INLINE friend Pack operator*(Pack a, Pack b) {
    for (int i = 0; i < kParts; ++i) a.v[i] *= b.v[i];
    return a;
  }
  FUSEDRES_INLINE friend Pack fma(Pack a, Pack b, Pack c) {
    for (int i = 0; i < kParts; ++i) c.v[i] = multiply_add<S>(a.v[i], b.v[i], c.v[i]);
    return c;
  }
  FUSEDRES_INLINE friend Mask not_below_or_equal(Pack a, Pack b) {
    Mask m;
    for (int i = 0; i < kParts; ++i) m.v[i] = ~(a.v[i] <= b.v[i]);
    return m;
  }
  // a > b, or a is NaN: when max pooling moves on to a
  FUSEDRES_INLINE friend Mask greater_or_nan(Pack a, Pack b) {
    Mask m;
    for (int i = 0; i < kParts; ++i) m.v[i] = (a.v[i] > b.v[i]) | (a.v[i] != a.v[i]);
    return m;
  }
  FUSEDRES_INLINE friend Pack keep(Mask m, Pack a) {
    for (int i = 0; i < kParts; ++i) a.v[i] = reinterpret_cast<Native>(reinterpret_cast<Flags>(a.v[i]) & m.v[i]);
    return a;
  }
  FUSEDRES_INLINE friend Pack blend(Mask m, Pack yes, Pack no) {
    for (int i = 0; i < kParts; ++i) no.v[i] = m.v[i] ? yes.v[i] : no.v[i];
    return no;
  }
  // Not inlined: lane by lane in every loop, these two would take most of the time of compiling the baseline.
  __attribute__((noinline)) friend uint16_t bits(Mask m) {
    uint32_t r = 0;
    for (int i = 0; i < kLanes; ++i) r |= static_cast<uint32_t>(m.v[i / kPartLanes][i % kPartLanes] & 1) << i;
    return static_cast<uint16_t>(r);
  }
  __attribute__((noinline)) friend Mask mask_from_bits(uint16_t b, Pack) {
    Mask m;
    for (int i = 0; i < kLanes; ++i) m.v[i / kPartLanes][i % kPartLanes] = -static_cast<I>((b >> i) & 1);
    return m;
  }
};

using F64 = Pack<double, int64_t>;
using MaskF64 = F64::Mask;

FUSEDRES_INLINE F64 broadcast(double a) {
  F64 r;
  for (auto& part : r.v) part = a - F64::Native{};
  return r;
}
FUSEDRES_INLINE F64 load(const double* p) {  // part by part, or the whole goes through the stack
  F64 r;
  for (int i = 0; i < F64::kParts; ++i) std::memcpy(&r.v[i], p + i * F64::kPartLanes, sizeof r.v[i]);
  return r;
}
FUSEDRES_INLINE F64 load_n(const double* p, int n) {
  double buffer[kLanes] = {};
  std::memcpy(buffer, p, n * sizeof(double));
  return load(buffer);
}
FUSEDRES_INLINE void store(double* p, F64 a) {
  for (int i = 0; i < F64::kParts; ++i) std::memcpy(p + i * F64::kPartLanes, &a.v[i], sizeof a.v[i]);
}
FUSEDRES_INLINE void stream(double* p, F64 a) { store(p, a); }
FUSEDRES_INLINE void store_n(double* p, F64 a, int n) { std::memcpy(p, a.v, n * sizeof(double)); }

// ---- float ----

#if defined(FUSEDRES_VEC_AVX512)

struct F32 {
  __m512 v;
};
struct MaskF32 {
  __mmask16 m;
};

FUSEDRES_INLINE __mmask16 first(int n) { return static_cast<__mmask16>((1u << n) - 1); }
FUSEDRES_INLINE F32 broadcast(float a) { return {_mm512_set1_ps(a)}; }
FUSEDRES_INLINE F32 widen(const bf16*, __m256i u) {
  return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(u), 16))};
}
FUSEDRES_INLINE F32 widen(const half*, __m256i u) { return {_mm512_cvtph_ps(u)}; }
FUSEDRES_INLINE __m256i narrow(const bf16*, F32 a) {
  __m256bh r = _mm512_cvtneps_pbh(a.v);
  __m256i u;
  std::memcpy(&u, &r, sizeof u);
  return u;
}
FUSEDRES_INLINE __m256i narrow(const half*, F32 a) { return _mm512_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT); }
FUSEDRES_INLINE F32 load(const float* p) { return {_mm512_loadu_ps(p)}; }
FUSEDRES_INLINE F32 load_n(const float* p, int n) { return {_mm512_maskz_loadu_ps(first(n), p)}; }
FUSEDRES_INLINE void store(float* p, F32 a) { _mm512_storeu_ps(p, a.v); }
FUSEDRES_INLINE void stream(float* p, F32 a) { _mm512_stream_ps(p, a.v); }
FUSEDRES_INLINE void store_n(float* p, F32 a, int n) { _mm512_mask_storeu_ps(p, first(n), a.v); }
template <class T>
FUSEDRES_INLINE F32 load(const T* p) {
  return widen(p, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
template <class T>
FUSEDRES_INLINE F32 load_n(const T* p, int n) {
  return widen(p, _mm256_maskz_loadu_epi16(first(n), p));
}
template <class T>
FUSEDRES_INLINE void store(T* p, F32 a) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), narrow(p, a));
}
template <class T>
FUSEDRES_INLINE void stream(T* p, F32 a) {
  _mm256_stream_si256(reinterpret_cast<__m256i*>(p), narrow(p, a));
}
template <class T>
FUSEDRES_INLINE void store_n(T* p, F32 a, int n) {
  _mm256_mask_storeu_epi16(p, first(n), narrow(p, a));
}
FUSEDRES_INLINE F32 operator+(F32 a, F32 b) { return {_mm512_add_ps(a.v, b.v)}; }
FUSEDRES_INLINE F32 operator-(F32 a, F32 b) { return {_mm512_sub_ps(a.v, b.v)}; }
FUSEDRES_INLINE F32 operator*(F32 a, F32 b) { return {_mm512_mul_ps(a.v, b.v)}; }
FUSEDRES_INLINE F32 fma(F32 a, F32 b, F32 c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
FUSEDRES_INLINE MaskF32 not_below_or_equal(F32 a, F32 b) { return {_mm512_cmp_ps_mask(a.v, b.v, _CMP_NLE_UQ)}; }
FUSEDRES_INLINE MaskF32 greater_or_nan(F32 a, F32 b) {
  return {
      static_cast<__mmask16>(_mm512_cmp_ps_mask(a.v, b.v, _CMP_GT_OQ) | _mm512_cmp_ps_mask(a.v, a.v, _CMP_UNORD_Q))};
}
FUSEDRES_INLINE F32 keep(MaskF32 m, F32 a) {
  asm("" : "+v"(a.v));  // or the compiler makes a masked load of it, which runs at half the speed from memory
  return {_mm512_maskz_mov_ps(m.m, a.v)};
}
FUSEDRES_INLINE F32 blend(MaskF32 m, F32 yes, F32 no) { return {_mm512_mask_mov_ps(no.v, m.m, yes.v)}; }
FUSEDRES_INLINE uint16_t bits(MaskF32 m) { return m.m; }
FUSEDRES_INLINE MaskF32 mask_from_bits(uint16_t b, F32) { return {b}; }

#elif defined(FUSEDRES_VEC_AVX2)

struct F32 {
  __m256 a, b;
};
struct MaskF32 {
  __m256 a, b;
};

FUSEDRES_INLINE F32 broadcast(float a) { return {_mm256_set1_ps(a), _mm256_set1_ps(a)}; }
FUSEDRES_INLINE __m256 widen_half(const bf16*, __m128i u) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(u), 16));
}
FUSEDRES_INLINE __m256 widen_half(const half*, __m128i u) { return _mm256_cvtph_ps(u); }
FUSEDRES_INLINE __m256i round_to_bf16(__m256 a) {  // to nearest even, in the low half of each 32-bit lane
  const __m256i u = _mm256_castps_si256(a);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(1));
  const __m256i rounded = _mm256_srli_epi32(_mm256_add_epi32(u, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff))), 16);
  const __m256i quiet_nan = _mm256_or_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(0x40));
  const __m256 is_nan = _mm256_cmp_ps(a, a, _CMP_UNORD_Q);
  return _mm256_blendv_epi8(rounded, quiet_nan, _mm256_castps_si256(is_nan));
}
FUSEDRES_INLINE __m256i narrow(const bf16*, F32 a) {
  const __m256i packed = _mm256_packus_epi32(round_to_bf16(a.a), round_to_bf16(a.b));
  return _mm256_permute4x64_epi64(packed, 0b11011000);
}
FUSEDRES_INLINE __m256i narrow(const half*, F32 a) {
  return _mm256_set_m128i(
      _mm256_cvtps_ph(a.b, _MM_FROUND_TO_NEAREST_INT), _mm256_cvtps_ph(a.a, _MM_FROUND_TO_NEAREST_INT));
}
FUSEDRES_INLINE F32 load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
FUSEDRES_INLINE void store(float* p, F32 a) {
  _mm256_storeu_ps(p, a.a);
  _mm256_storeu_ps(p + 8, a.b);
}
FUSEDRES_INLINE void stream(float* p, F32 a) {
  _mm256_stream_ps(p, a.a);
  _mm256_stream_ps(p + 8, a.b);
}
template <class T>
FUSEDRES_INLINE F32 load(const T* p) {
  const __m128i* q = reinterpret_cast<const __m128i*>(p);
  return {widen_half(p, _mm_loadu_si128(q)), widen_half(p, _mm_loadu_si128(q + 1))};
}
template <class T>
FUSEDRES_INLINE void store(T* p, F32 a) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), narrow(p, a));
}
template <class T>
FUSEDRES_INLINE void stream(T* p, F32 a) {
  _mm256_stream_si256(reinterpret_cast<__m256i*>(p), narrow(p, a));
}
FUSEDRES_INLINE F32 operator+(F32 a, F32 b) { return {_mm256_add_ps(a.a, b.a), _mm256_add_ps(a.b, b.b)}; }
FUSEDRES_INLINE F32 operator-(F32 a, F32 b) { return {_mm256_sub_ps(a.a, b.a), _mm256_sub_ps(a.b, b.b)}; }
FUSEDRES_INLINE F32 operator*(F32 a, F32 b) { return {_mm256_mul_ps(a.a, b.a), _mm256_mul_ps(a.b, b.b)}; }
FUSEDRES_INLINE F32 fma(F32 a, F32 b, F32 c) {
  return {_mm256_fmadd_ps(a.a, b.a, c.a), _mm256_fmadd_ps(a.b, b.b, c.b)};
}
FUSEDRES_INLINE MaskF32 not_below_or_equal(F32 a, F32 b) {
  return {_mm256_cmp_ps(a.a, b.a, _CMP_NLE_UQ), _mm256_cmp_ps(a.b, b.b, _CMP_NLE_UQ)};
}
FUSEDRES_INLINE MaskF32 greater_or_nan(F32 a, F32 b) {
  return {
      _mm256_or_ps(_mm256_cmp_ps(a.a, b.a, _CMP_GT_OQ), _mm256_cmp_ps(a.a, a.a, _CMP_UNORD_Q)),
      _mm256_or_ps(_mm256_cmp_ps(a.b, b.b, _CMP_GT_OQ), _mm256_cmp_ps(a.b, a.b, _CMP_UNORD_Q))};
}
FUSEDRES_INLINE F32 keep(MaskF32 m, F32 a) { return {_mm256_and_ps(m.a, a.a), _mm256_and_ps(m.b, a.b)}; }
FUSEDRES_INLINE F32 blend(MaskF32 m, F32 yes, F32 no) {
  return {_mm256_blendv_ps(no.a, yes.a, m.a), _mm256_blendv_ps(no.b, yes.b, m.b)};
}
FUSEDRES_INLINE uint16_t bits(MaskF32 m) {
  return static_cast<uint16_t>(_mm256_movemask_ps(m.a) | (_mm256_movemask_ps(m.b) << 8));
}
FUSEDRES_INLINE MaskF32 mask_from_bits(uint16_t b, F32) {
  const __m256i select = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
  const __m256i low = _mm256_and_si256(_mm256_set1_epi32(b), select);
  const __m256i high = _mm256_and_si256(_mm256_set1_epi32(b >> 8), select);
  return {_mm256_castsi256_ps(_mm256_cmpeq_epi32(low, select)), _mm256_castsi256_ps(_mm256_cmpeq_epi32(high, select))};
}

#else

using F32 = Pack<float, int32_t>;
using MaskF32 = F32::Mask;

FUSEDRES_INLINE float widen(bf16 x) {
  const uint32_t u = static_cast<uint32_t>(x.bits) << 16;
  float r;
  std::memcpy(&r, &u, sizeof r);
  return r;
}
FUSEDRES_INLINE float widen(half x) {  // exact: the exponent is moved by a multiplication
  const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000) << 16;
  const uint32_t magnitude = static_cast<uint32_t>(x.bits & 0x7fff) << 13;
  float r;
  std::memcpy(&r, &magnitude, sizeof r);
  r *= 0x1p112f;
  uint32_t u;
  std::memcpy(&u, &r, sizeof u);
  u = (magnitude >= 0x0f800000u ? (u | 0x7f800000u) : u) | sign;
  std::memcpy(&r, &u, sizeof r);
  return r;
}
FUSEDRES_INLINE void narrow(bf16& r, float a) {
  uint32_t u;
  std::memcpy(&u, &a, sizeof u);
  const uint32_t rounded = (u + 0x7fff + ((u >> 16) & 1)) >> 16;
  r.bits = static_cast<uint16_t>(a != a ? (u >> 16) | 0x40 : rounded);
}
FUSEDRES_INLINE void narrow(half& r, float a) {
  uint32_t u;
  std::memcpy(&u, &a, sizeof u);
  const uint32_t sign = (u >> 16) & 0x8000;
  u &= 0x7fffffffu;
  uint32_t out;
  if (u > 0x7f800000u) {
    out = 0x7e00u | (u >> 13 & 0x1ffu);
  } else if (u >= 0x477ff000u) {  // rounds to 65520 or more
    out = 0x7c00u;
  } else if (u < 0x38800000u) {  // subnormal in half: let the addition round
    float magnitude;
    std::memcpy(&magnitude, &u, sizeof magnitude);
    magnitude += 0.5f;
    std::memcpy(&out, &magnitude, sizeof out);
    out -= 0x3f000000u;
  } else {
    out = (u - 0x38000000u + 0xfffu + ((u >> 13) & 1)) >> 13;
  }
  r.bits = static_cast<uint16_t>(out | sign);
}

FUSEDRES_INLINE F32 broadcast(float a) {
  F32 r;
  for (auto& part : r.v) part = a - F32::Native{};
  return r;
}
FUSEDRES_INLINE F32 load(const float* p) {
  F32 r;
  std::memcpy(r.v, p, sizeof r.v);
  return r;
}
FUSEDRES_INLINE void store(float* p, F32 a) { std::memcpy(p, a.v, sizeof a.v); }
FUSEDRES_INLINE void stream(float* p, F32 a) { store(p, a); }
// Not inlined: sixteen conversions in every loop would make the build of the baseline slower than all the rest.
template <class T>
__attribute__((noinline)) F32 load(const T* p) {
  float wide[kLanes];
  for (int i = 0; i < kLanes; ++i) wide[i] = widen(p[i]);
  return load(wide);
}
template <class T>
__attribute__((noinline)) void store(T* p, F32 a) {
  float wide[kLanes];
  store(wide, a);
  for (int i = 0; i < kLanes; ++i) narrow(p[i], wide[i]);
}
template <class T>
FUSEDRES_INLINE void stream(T* p, F32 a) {
  store(p, a);
}

#endif

#if !defined(FUSEDRES_VEC_AVX512)
// Partial vectors through a buffer: lanes from n on read as zero and are not written.
template <class T>
FUSEDRES_INLINE F32 load_n(const T* p, int n) {
  T buffer[kLanes] = {};
  std::memcpy(buffer, p, n * sizeof(T));
  return load(buffer);
}
template <class T>
FUSEDRES_INLINE void store_n(T* p, F32 a, int n) {
  T buffer[kLanes];
  store(buffer, a);
  std::memcpy(p, buffer, n * sizeof(T));
}
#endif

FUSEDRES_INLINE F64 to_double(F64 a) { return a; }
FUSEDRES_INLINE F64 to_double(F32 a) {
  typedef float Half __attribute__((vector_size(kNativeBytes / 2)));
  Half parts[F64::kParts];
  static_assert(sizeof parts == sizeof a);
  std::memcpy(parts, &a, sizeof a);
  F64 r;
  for (int i = 0; i < F64::kParts; ++i) r.v[i] = __builtin_convertvector(parts[i], F64::Native);
  return r;
}

template <class T>
struct Compute {
  using Scalar = float;
  using Vec = F32;
  using Mask = MaskF32;
};
template <>
struct Compute<double> {
  using Scalar = double;
  using Vec = F64;
  using Mask = MaskF64;
};

// The mask of a ReLU whose result is stored as T. NaN counts as positive, so that it passes, as in torch.
template <class T>
FUSEDRES_INLINE typename Compute<T>::Mask positive(typename Compute<T>::Vec a) {
  return not_below_or_equal(a, broadcast(static_cast<typename Compute<T>::Scalar>(zero_below<T>)));
}

// As T has it.
template <class T, class V>
FUSEDRES_INLINE V rounded(V a) {
  if constexpr (sizeof(T) == sizeof(typename Compute<T>::Scalar)) {
    return a;
  } else {
    [[maybe_unused]] const T* const as = nullptr;
#if defined(FUSEDRES_VEC_AVX512)
    return widen(as, narrow(as, a));
#elif defined(FUSEDRES_VEC_AVX2)
    const __m256i u = narrow(as, a);
    return {widen_half(as, _mm256_castsi256_si128(u)), widen_half(as, _mm256_extracti128_si256(u, 1))};
#else
    T lanes[kLanes];
    store(lanes, a);
    return load(lanes);
#endif
  }
}

// All ones in the first n lanes.
template <class V>
FUSEDRES_INLINE auto first_lanes(int n, V v) {
  return mask_from_bits(static_cast<uint16_t>((1u << n) - 1), v);
}

// Lanes that are small whole numbers, as bytes.
FUSEDRES_INLINE void store_bytes(uint8_t* p, F32 a) {
#if defined(FUSEDRES_VEC_AVX512)
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(a.v)));
#else
  float lanes[kLanes];
  store(lanes, a);
  for (int i = 0; i < kLanes; ++i) p[i] = static_cast<uint8_t>(lanes[i]);
#endif
}
FUSEDRES_INLINE void store_bytes(uint8_t* p, F64 a) {
  double lanes[kLanes];
  store(lanes, a);
  for (int i = 0; i < kLanes; ++i) p[i] = static_cast<uint8_t>(lanes[i]);
}

template <class V>
FUSEDRES_INLINE auto bytes_equal(const uint8_t* p, uint8_t value, V v) {
#if defined(FUSEDRES_VEC_AVX512) || defined(FUSEDRES_VEC_AVX2)
  const __m128i equal =
      _mm_cmpeq_epi8(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)), _mm_set1_epi8(static_cast<char>(value)));
  return mask_from_bits(static_cast<uint16_t>(_mm_movemask_epi8(equal)), v);
#else
  uint32_t r = 0;
  for (int i = 0; i < kLanes; ++i) r |= static_cast<uint32_t>(p[i] == value) << i;
  return mask_from_bits(static_cast<uint16_t>(r), v);
#endif
}

// Whether two vectors of T are best stored together: they fill a cache line, which half a line streamed does not.
#if defined(FUSEDRES_VEC_AVX512)
template <class T>
constexpr bool kStoredInPairs = sizeof(T) == 2;
FUSEDRES_INLINE __m512i narrow(const bf16*, F32 a, F32 b) {
  __m512bh r = _mm512_cvtne2ps_pbh(b.v, a.v);
  __m512i u;
  std::memcpy(&u, &r, sizeof u);
  return u;
}
FUSEDRES_INLINE __m512i narrow(const half* p, F32 a, F32 b) {
  return _mm512_inserti64x4(_mm512_castsi256_si512(narrow(p, a)), narrow(p, b), 1);
}
template <bool kStream, class T>
FUSEDRES_INLINE void store_pair(T* p, F32 a, F32 b) {
  if constexpr (kStream) {
    _mm512_stream_si512(reinterpret_cast<__m512i*>(p), narrow(p, a, b));
  } else {
    _mm512_storeu_si512(p, narrow(p, a, b));
  }
}
#else
template <class T>
constexpr bool kStoredInPairs = false;
#endif

// Copies 2 * kLanes elements, with zeros where the two words have zeros. 16-bit ones are not widened.
template <bool kStream, class T>
FUSEDRES_INLINE void copy_kept(T* to, const T* from, const uint16_t* words) {
#if defined(FUSEDRES_VEC_AVX512)
  if constexpr (sizeof(T) == 2) {
    uint32_t bits;
    std::memcpy(&bits, words, sizeof bits);
    __m512i v = _mm512_loadu_si512(from);
    asm("" : "+v"(v));  // see keep()
    v = _mm512_maskz_mov_epi16(bits, v);
    if constexpr (kStream) {
      _mm512_stream_si512(reinterpret_cast<__m512i*>(to), v);
    } else {
      _mm512_storeu_si512(to, v);
    }
    return;
  }
#endif
  for (int part = 0; part < 2; ++part) {
    auto v = load(from + part * kLanes);
    v = keep(mask_from_bits(words[part], v), v);
    if constexpr (kStream) {
      stream(to + part * kLanes, v);
    } else {
      store(to + part * kLanes, v);
    }
  }
}

template <class V, class S>
FUSEDRES_INLINE void add_to(S* p, V a) {
  store(p, load(p) + a);
}

}  // namespace
}  // namespace fusedres::cpu
