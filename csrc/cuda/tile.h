// How the threads of a block walk a tensor that csrc/common/launch_plan.h has cut, in either layout.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "common/launch_plan.h"
#include "cuda/vector.h"

namespace fusedres {

template <typename T>
using Compute = std::conditional_t<std::is_same_v<T, double>, double, float>;

template <typename T>
constexpr int kVector = kVectorBytes / static_cast<int>(sizeof(T));

// Channels that one thread meets: those of a vector, or the one of its plane.
template <typename T, bool kChannelsLast>
constexpr int kLanes = kChannelsLast ? kVector<T> : 1;

// Which tile and chunk a block has.
struct BlockPlace {
  int64_t tile, chunk;

  __device__ BlockPlace(const Tiles& tiles, const Pass& pass, int64_t block, bool reverse) {
    if (reverse) block = tiles.tiles * pass.chunks - 1 - block;
    chunk = block / tiles.tiles;
    tile = block - chunk * tiles.tiles;
  }
};

// Where a vector lies.
struct Place {
  int64_t offset;  // of its first element; of padding, the last of its plane
  int64_t bit;     // of its first element in a mask
  int valid;       // how many of its elements exist
};

__device__ inline int thread_x(const Tiles& t) { return static_cast<int>(threadIdx.x) & (t.threads_x - 1); }
__device__ inline int thread_y(const Tiles& t) { return static_cast<int>(threadIdx.x) / t.threads_x; }

// The vectors of one thread, in order. `aligned`: vectors lie at multiples of 16 bytes. The first `whole()` of them may
// then be taken with kFast: their elements all exist or, in the padding of a plane, none.
template <typename T, bool kChannelsLast>
class Walk {
 public:
  static constexpr int V = kVector<T>;

  __device__ Walk(const Tiles& t, const BlockPlace& block, int64_t chunk, bool aligned) : t_(t) {
    const int64_t begin = block.chunk * chunk;
    const int y = thread_y(t);
    if constexpr (kChannelsLast) {
      const int64_t column = block.tile * t.threads_x + thread_x(t);
      const int64_t left = min(chunk, t.rows - begin) - y;
      count_ = column < t.row_vectors && left > 0 ? static_cast<int>((left - 1) / t.threads_y) + 1 : 0;
      position_ = (begin + y) * t.row_length + column * V;
      step_ = t.threads_y * t.row_length;
      whole_ = aligned ? count_ : 0;
      // Only the last row of the matrix is partial. Threads that share a byte of a mask go the same way.
      constexpr int kTogether = V > 8 ? V : 8;
      const int64_t last = position_ + (count_ - 1) * step_;
      if (whole_ > 0 && last / kTogether * kTogether + kTogether > t.numel) --whole_;
    } else {
      const int64_t first = begin + y;
      const int64_t left = min(chunk, t.rows * t.row_vectors - begin) - y;
      count_ = left > 0 ? static_cast<int>((left - 1) / t.threads_y) + 1 : 0;
      whole_ = aligned ? count_ : 0;
      const int64_t row = first / t.row_vectors;
      column_ = first - row * t.row_vectors;
      position_ = row * t.channels + block.tile;
    }
  }

  __device__ int count() const { return count_; }
  __device__ int whole() const { return whole_; }

  template <bool kFast>
  __device__ Place place() const {
    if constexpr (kChannelsLast) {
      const int64_t left = t_.numel - position_;
      return {position_, position_, kFast || left >= V ? V : left > 0 ? static_cast<int>(left) : 0};
    } else {
      const int64_t left = t_.area - column_ * V;
      return {
          position_ * t_.area + (left > 0 ? column_ * V : t_.area - 1),
          (position_ * t_.row_vectors + column_) * V,
          left >= V            ? V
          : kFast || left <= 0 ? 0
                               : static_cast<int>(left)};
    }
  }

  __device__ void advance() {
    if constexpr (kChannelsLast) {
      position_ += step_;
    } else {
      position_ += t_.step_rows * t_.channels;
      column_ += t_.step_vectors;
      if (column_ >= t_.row_vectors) {
        column_ -= t_.row_vectors;
        position_ += t_.channels;
      }
    }
  }

 private:
  const Tiles& t_;
  int count_, whole_;
  int64_t position_;  // channels_last: the element; contiguous: the plane among all
  int64_t step_;      // channels_last: elements between two vectors
  int64_t column_;    // contiguous: the vector in its plane
};

// One access of 16 bytes.
template <typename V>
__device__ inline void load_16_bytes(V& value, const void* from) {
  static_assert(sizeof(V) == sizeof(uint4));
  const uint4 bytes = *static_cast<const uint4*>(from);
  memcpy(&value, &bytes, sizeof(V));
}

template <typename V>
__device__ inline uint4 bytes_of(const V& value) {
  static_assert(sizeof(V) == sizeof(uint4));
  uint4 bytes;
  memcpy(&bytes, &value, sizeof(V));
  return bytes;
}

// A vector's elements; zeros where they do not exist.
template <bool kFast, typename T, int V>
__device__ inline void load_at(Vector<T, V>& value, const T* __restrict__ data, const Place& p, bool aligned) {
  const bool whole = p.valid == V && (kFast || aligned);
  if (whole) {
    load_16_bytes(value, data + p.offset);
  } else {
#pragma unroll
    for (int i = 0; i < V; ++i) value.at[i] = !kFast && i < p.valid ? data[p.offset + i] : T(0.0f);
  }
}

template <bool kFast, typename T, int V>
__device__ inline void store_at(const Vector<T, V>& value, T* __restrict__ data, const Place& p, bool aligned) {
  const bool whole = p.valid == V && (kFast || aligned);
  if (whole) {
    // A plain assignment nvcc may take apart into stores of 4 bytes.
    __stcg(reinterpret_cast<uint4*>(data + p.offset), bytes_of(value));
  } else if constexpr (!kFast) {
#pragma unroll
    for (int i = 0; i < V; ++i) {
      if (i < p.valid) data[p.offset + i] = value.at[i];
    }
  }
}

// Calls body.template run<kFast>(places, k) for all vectors of a thread, kUnroll at a time while they are whole; k
// counts the vectors. What a body loads for one call is in flight together.
template <int kUnroll, typename W, typename Body>
__device__ inline void for_each_vector(W walk, Body& body) {
  int k = 0;
#pragma unroll 1
  for (; k + kUnroll <= walk.whole(); k += kUnroll) {
    Place places[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      places[u] = walk.template place<true>();
      walk.advance();
    }
    body.template run<true>(places, k);
  }
#pragma unroll 1
  for (; k < walk.count(); ++k) {
    const Place places[1] = {walk.template place<false>()};
    walk.advance();
    body.template run<false>(places, k);
  }
}

}  // namespace fusedres
