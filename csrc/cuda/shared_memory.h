// Dynamic shared memory, whose size is given at the launch.
#pragma once

#include <cuda_runtime.h>

namespace fusedres {

// The block's dynamic shared memory, aligned to 16 bytes. A function, for `extern __shared__` arrays of one name must
// be of one type everywhere, and a compiler for the host knows none.
template <typename T>
__device__ inline T* dynamic_shared_memory() {
#if defined(__CUDACC__)
  extern __shared__ __align__(16) unsigned char fusedres_dynamic_shared_memory[];
  return reinterpret_cast<T*>(fusedres_dynamic_shared_memory);
#else
  return static_cast<T*>(host_cuda::dynamic_shared_memory());
#endif
}

}  // namespace fusedres
