// Memory accesses of up to 16 bytes per thread.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace fusedres {

// V consecutive elements that move as one access where V * sizeof(T) is a width the hardware has.
template <typename T, int V>
struct alignas(sizeof(T) * V) Vector {
  T at[V];
};

// Vector v of an array of n elements. Without kWhole it may reach beyond the end, where it reads zeros and writes
// nothing.
template <bool kWhole, typename T, int V>
__device__ inline void load(Vector<T, V>& value, const T* __restrict__ data, int64_t v, int64_t n) {
  if (kWhole || (v + 1) * V <= n) {
    value = reinterpret_cast<const Vector<T, V>*>(data)[v];
  } else {
    for (int i = 0; i < V; ++i) value.at[i] = v * V + i < n ? data[v * V + i] : T(0.0f);
  }
}

template <bool kWhole, typename T, int V>
__device__ inline void store(const Vector<T, V>& value, T* __restrict__ data, int64_t v, int64_t n) {
  if (kWhole || (v + 1) * V <= n) {
    reinterpret_cast<Vector<T, V>*>(data)[v] = value;
  } else {
    for (int i = 0; i < V && v * V + i < n; ++i) data[v * V + i] = value.at[i];
  }
}

}  // namespace fusedres
