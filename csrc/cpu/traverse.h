// How the element-wise and reducing kernels walk a tensor. A body says what happens to one vector; the walks here bring
// it to every vector of a channels_last tensor (rows) or of a contiguous one (planes), with the parameters of its
// columns or of its channel: Body::kSlots vectors from the table body.params (see batch_norm_kernels.h).
//
// A body holds its arguments by value: through a reference every vector store, which may alias anything, makes the
// compiler load the pointers again.
//
// Rows: the tensor is a matrix of `count` rows of `width` elements and a last row of `tail` elements. `width` is the
// number of channels, or the least multiple of it that is a multiple of 16: three channels are walked as 48, so that no
// lane is idle and the mask is one bit per element in memory order. Sums then come out per column, several to a
// channel. Planes: N*C planes of `area` elements; lanes past the end of a plane are masked.
#pragma once

#include "vec.h"

namespace fusedres::cpu {
namespace {

// Vectors of a plane that are summed apart, and rows that a reduction walks together so that one load and store of its
// running sums serves several. The baseline, and double, have too few registers to gain by either.
#if defined(FUSEDRES_VEC_AVX512) || defined(FUSEDRES_VEC_AVX2)
template <class Scalar>
constexpr int kTogether = sizeof(Scalar) == 4 ? 4 : 1;
#else
template <class Scalar>
constexpr int kTogether = 1;
#endif
// Rows of more bytes are walked one by one: several at once are then so many streams, a page apart, that compete for
// the same cache sets, and from memory that is slower.
constexpr int64_t kAdjacentRowBytes = 1024;

constexpr int64_t kColumnChunk = 1024;  // columns whose parameters and running sums stay in L1 from row to row
constexpr int64_t kPlaneGroup = 16;     // channels whose running sums are kept together

template <bool kFull, class T>
FUSEDRES_INLINE auto get(const T* p, int n) {
  if constexpr (kFull) {
    return load(p);
  } else {
    return load_n(p, n);
  }
}

template <bool kFull, bool kStream, class T, class V>
FUSEDRES_INLINE void put(T* p, V v, int n) {
  if constexpr (!kFull) {
    store_n(p, v, n);
  } else if constexpr (kStream) {
    stream(p, v);
  } else {
    store(p, v);
  }
}

#if defined(FUSEDRES_VEC_AVX512) || defined(FUSEDRES_VEC_AVX2)
constexpr bool kHasStreams = true;
#else
constexpr bool kHasStreams = false;  // stream() is store()
#endif

FUSEDRES_INLINE void finish_streams(bool streamed) {
#if defined(FUSEDRES_VEC_AVX512) || defined(FUSEDRES_VEC_AVX2)
  if (streamed) _mm_sfence();
#else
  (void)streamed;
#endif
}

template <class Vec, int kSlots>
struct Params {
  Vec at[kSlots];
  FUSEDRES_INLINE Vec operator[](int slot) const { return at[slot]; }
};

// Of the vector of columns that begins with c.
template <int kSlots, class S>
FUSEDRES_INLINE auto column_params(const S* table, int64_t c) {
  Params<decltype(load(table)), kSlots> p;
  for (int k = 0; k < kSlots; ++k) p.at[k] = load(table + c * kSlots + k * kLanes);
  return p;
}

template <int kSlots, class S>
FUSEDRES_INLINE auto channel_params(const S* table, int64_t c) {
  Params<decltype(load(table)), kSlots> p;
  for (int k = 0; k < kSlots; ++k) p.at[k] = broadcast(table[(c / kLanes * kSlots + k) * kLanes + c % kLanes]);
  return p;
}

// What a body makes of one vector: as many outputs as it has, of which some may not be wanted.
template <class Vec, int kOutputs>
struct Values {
  Vec at[kOutputs];
};

template <class T, int kOutputs>
struct Outputs {
  T* at[kOutputs];  // or null
};

template <bool kFull, class Body, class P>
FUSEDRES_INLINE void map_vector(const Body& body, const P& p, int64_t i, int64_t word, int n) {
  const auto values = body.template map<kFull>(p, i, word, n);
  for (int k = 0; k < Body::kOutputs; ++k) {
    if (body.outputs.at[k]) put<kFull, Body::kStreams>(body.outputs.at[k] + i, values.at[k], n);
  }
}

template <class Body>
FUSEDRES_INLINE void map_rows(const Body& body, const Rows& rows, int64_t row0, int64_t row1, int64_t c0, int64_t c1) {
  using T = typename Body::Element;
  [[maybe_unused]] const bool aligned = rows.width % (2 * kLanes) == 0 && c0 % (2 * kLanes) == 0;
  for (int64_t chunk = c0; chunk < c1; chunk += kColumnChunk) {
    const int64_t chunk_end = chunk + kColumnChunk < c1 ? chunk + kColumnChunk : c1;
    for (int64_t r = row0; r < row1; ++r) {
      const int64_t end = r < rows.count || chunk_end < rows.tail ? chunk_end : rows.tail;
      const int64_t first = r * rows.width;
      int64_t c = chunk;
      if constexpr (kStoredInPairs<typename Body::Element>) {
        for (; aligned && c + 2 * kLanes <= end; c += 2 * kLanes) {
          const int64_t i = first + c;
          const auto low = body.template map<true>(column_params<Body::kSlots>(body.params, c), i, i / kLanes, kLanes);
          const auto high = body.template map<true>(
              column_params<Body::kSlots>(body.params, c + kLanes), i + kLanes, i / kLanes + 1, kLanes);
          for (int k = 0; k < Body::kOutputs; ++k) {
            if (T* const out = body.outputs.at[k]) store_pair<Body::kStreams>(out + i, low.at[k], high.at[k]);
          }
        }
      }
      for (; c + kLanes <= end; c += kLanes) {
        const int64_t i = first + c;
        map_vector<true>(body, column_params<Body::kSlots>(body.params, c), i, i / kLanes, kLanes);
      }
      if (c < end) {
        const int64_t i = first + c;
        map_vector<false>(body, column_params<Body::kSlots>(body.params, c), i, i / kLanes, static_cast<int>(end - c));
      }
    }
  }
}

template <class Body>
FUSEDRES_INLINE void map_planes(
    const Body& body, const Planes& planes, int64_t n0, int64_t n1, int64_t c0, int64_t c1) {
  const int64_t words = (planes.area + kLanes - 1) / kLanes;
  const int64_t full = planes.area / kLanes;
  const int rest = static_cast<int>(planes.area % kLanes);
  for (int64_t n = n0; n < n1; ++n) {
    for (int64_t c = c0; c < c1; ++c) {
      const auto p = channel_params<Body::kSlots>(body.params, c);
      const int64_t plane = n * planes.channels + c;
      const int64_t i = plane * planes.area;
      const int64_t word = plane * words;
      for (int64_t j = 0; j < full; ++j) map_vector<true>(body, p, i + j * kLanes, word + j, kLanes);
      if (rest) map_vector<false>(body, p, i + full * kLanes, word + full, rest);
    }
  }
}

// Adds to sums[k][c], for every column in [c0, c1), the sums over the rows of the body's kSums quantities. Sums of
// Body::kTile rows at most are taken in the compute type; they are added up in double.
template <int kRows, class Body>
FUSEDRES_INLINE void reduce_rows(
    const Body& body, const Rows& rows, int64_t row0, int64_t row1, int64_t c0, int64_t c1, double* const* sums) {
  using Scalar = typename Body::Scalar;
  using Vec = typename Body::Vec;
  constexpr int K = Body::kSums;
  alignas(64) Scalar tile[K][kColumnChunk];
  const int64_t full = row1 < rows.count ? row1 : rows.count;
  for (int64_t chunk = c0; chunk < c1; chunk += kColumnChunk) {
    const int64_t end = chunk + kColumnChunk < c1 ? chunk + kColumnChunk : c1;
    for (int64_t row = row0; row < row1; row += Body::kTile) {
      const int64_t tile_end = row + Body::kTile < row1 ? row + Body::kTile : row1;
      const int64_t full_end = tile_end < full ? tile_end : full;
      for (int k = 0; k < K; ++k) std::memset(tile[k], 0, (end - chunk) * sizeof(Scalar));
      int64_t r = row;
      for (; r + kRows <= full_end; r += kRows) {
        for (int64_t c = chunk; c < end; c += kLanes) {
          const auto p = column_params<Body::kSlots>(body.params, c);
          // Even and odd rows are summed apart and then added to the tile's sums: short chains of roundings.
          Vec s[2][K];
          for (int k = 0; k < K; ++k) s[0][k] = s[1][k] = broadcast(Scalar(0));
          for (int u = 0; u < kRows; ++u) {
            const int64_t i = (r + u) * rows.width + c;
            body.template accumulate<true>(p, s[u % 2], i, i / kLanes, kLanes);
          }
          for (int k = 0; k < K; ++k) add_to(tile[k] + c - chunk, s[0][k] + s[1][k]);
        }
      }
      for (; r < tile_end; ++r) {
        const int64_t row_width = r < rows.count ? end : (rows.tail < end ? rows.tail : end);
        for (int64_t c = chunk; c < row_width; c += kLanes) {
          const auto p = column_params<Body::kSlots>(body.params, c);
          Vec s[K];
          for (int k = 0; k < K; ++k) s[k] = load(tile[k] + c - chunk);
          const int64_t i = r * rows.width + c;
          if (c + kLanes <= row_width) {
            body.template accumulate<true>(p, s, i, i / kLanes, kLanes);
          } else {
            body.template accumulate<false>(p, s, i, i / kLanes, static_cast<int>(row_width - c));
          }
          for (int k = 0; k < K; ++k) store(tile[k] + c - chunk, s[k]);
        }
      }
      for (int k = 0; k < K; ++k) {
        for (int64_t c = chunk; c < end; ++c) sums[k][c] += static_cast<double>(tile[k][c - chunk]);
      }
    }
  }
}

// Adds to sums[k][c], for every channel in [c0, c1), the sums over the planes n0 <= n < n1. Sums of Body::kTile vectors
// at most are taken in the compute type, lane by lane; they are added up in double.
template <class Body>
FUSEDRES_INLINE void reduce_planes(
    const Body& body, const Planes& planes, int64_t n0, int64_t n1, int64_t c0, int64_t c1, double* const* sums) {
  using Scalar = typename Body::Scalar;
  using Vec = typename Body::Vec;
  constexpr int K = Body::kSums;
  constexpr int kUnroll = kTogether<Scalar>;
  alignas(64) double lanes[kPlaneGroup][K][kLanes];
  const int64_t words = (planes.area + kLanes - 1) / kLanes;
  const int64_t full = planes.area / kLanes;
  const int rest = static_cast<int>(planes.area % kLanes);
  for (int64_t group = c0; group < c1; group += kPlaneGroup) {
    const int64_t end = group + kPlaneGroup < c1 ? group + kPlaneGroup : c1;
    std::memset(lanes, 0, sizeof lanes);
    for (int64_t n = n0; n < n1; ++n) {
      for (int64_t c = group; c < end; ++c) {
        const auto p = channel_params<Body::kSlots>(body.params, c);
        const int64_t plane = n * planes.channels + c;
        const int64_t i = plane * planes.area;
        const int64_t word = plane * words;
        for (int64_t j0 = 0; j0 < words; j0 += Body::kTile) {
          Vec s[kUnroll][K];
          for (int u = 0; u < kUnroll; ++u) {
            for (int k = 0; k < K; ++k) s[u][k] = broadcast(Scalar(0));
          }
          const int64_t limit = j0 + Body::kTile;
          const int64_t stop = limit < full ? limit : full;
          int64_t j = j0;
          for (; j + kUnroll <= stop; j += kUnroll) {
            for (int u = 0; u < kUnroll; ++u) {
              body.template accumulate<true>(p, s[u], i + (j + u) * kLanes, word + j + u, kLanes);
            }
          }
          for (; j < stop; ++j) body.template accumulate<true>(p, s[0], i + j * kLanes, word + j, kLanes);
          if (rest && limit >= words) body.template accumulate<false>(p, s[0], i + full * kLanes, word + full, rest);
          for (int k = 0; k < K; ++k) {
            for (int u = 1; u < kUnroll; ++u) s[0][k] = s[0][k] + s[u][k];
            Scalar narrow[kLanes];
            store(narrow, s[0][k]);
            for (int l = 0; l < kLanes; ++l) lanes[c - group][k][l] += static_cast<double>(narrow[l]);
          }
        }
      }
    }
    for (int64_t c = group; c < end; ++c) {
      for (int k = 0; k < K; ++k) {
        double total = 0.0;
        for (int l = 0; l < kLanes; ++l) total += lanes[c - group][k][l];
        sums[k][c] += total;
      }
    }
  }
}

}  // namespace
}  // namespace fusedres::cpu
