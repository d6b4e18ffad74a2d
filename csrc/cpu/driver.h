// What the drivers of all CPU families share: dispatch on dtype and instruction set, threads, scratch memory.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <cstdlib>
#include <memory>
#include <type_traits>
#include <utility>

#include "common/checks.h"
#include "common/cpu_capability.h"
#include "common/layout.h"
#include "types.h"

namespace fusedres::cpu {

// Whether an output of `numel` elements bypasses the caches: a large one would be evicted before its consumer runs, and
// a normal store first reads the line it writes. Only AVX-512 kernels fill whole lines with 16-bit elements, and
// streams of half lines gain later.
template <class T>
bool streams(int64_t numel) {
  const bool whole_lines = sizeof(T) >= 4 || cpu_capability() >= Capability::avx512;
  return numel * static_cast<int64_t>(sizeof(T)) >= (int64_t{whole_lines ? 3 : 8} << 20);
}

constexpr int64_t kSerialElements = 32 * 1024;  // below this a second thread costs more than it brings

template <class T>
T* data(const Tensor& t) {
  return static_cast<T*>(t.data_ptr());
}

template <class T>
T* data(const OptionalTensor& t) {
  return t && t->numel() > 0 ? static_cast<T*>(t->data_ptr()) : nullptr;
}

// Calls f with a null pointer to the storage type.
template <class F>
auto dispatch(ScalarType dtype, const F& f) {
  switch (dtype) {
    case ScalarType::Float:
      return f(static_cast<float*>(nullptr));
    case ScalarType::Double:
      return f(static_cast<double*>(nullptr));
    case ScalarType::BFloat16:
      return f(static_cast<bf16*>(nullptr));
    default:
      STD_TORCH_CHECK(dtype == ScalarType::Half, "x must be float32, float64, bfloat16 or float16");
      return f(static_cast<half*>(nullptr));
  }
}

// Runs f(task) for every task, on torch's threads. What a task computes may not depend on who runs it.
template <class F>
void for_each_task(int64_t tasks, int64_t elements, const F& f) {
  if (tasks <= 1 || elements < kSerialElements) {
    for (int64_t t = 0; t < tasks; ++t) f(t);
    return;
  }
  torch::stable::parallel_for(0, tasks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) f(t);
  });
}

inline int64_t threads() { return torch::stable::get_num_threads(); }

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Scratch memory of a thread, grown and kept: a call in steady state allocates nothing.
class Scratch {
 public:
  template <class S>
  S* take(int64_t count) {
    const size_t bytes = ceil_div(count * static_cast<int64_t>(sizeof(S)), 64) * 64;
    STD_TORCH_CHECK(used_ + bytes <= size_, "scratch of ", size_, " bytes is too small");
    S* p = reinterpret_cast<S*>(memory_.get() + used_);
    used_ += bytes;
    return p;
  }
  // The calling thread's scratch with room for `bytes`, besides what rounding up each of up to 64 pieces takes. A
  // driver and the tasks that it runs, maybe on its own thread, have different ones.
  struct Driver;
  struct Task;
  template <class User = Driver>
  static Scratch& with(size_t bytes) {
    thread_local Scratch scratch;
    bytes += 64 * 64;
    scratch.used_ = 0;
    if (scratch.size_ < bytes) {
      scratch.size_ = 0;
      scratch.memory_.reset(static_cast<char*>(std::aligned_alloc(64, ceil_div(bytes, 64) * 64)));
      STD_TORCH_CHECK(scratch.memory_, "out of memory: cannot allocate ", bytes, " bytes of scratch");
      scratch.size_ = bytes;
    }
    return scratch;
  }

 private:
  struct Free {
    void operator()(char* p) const { std::free(p); }
  };
  std::unique_ptr<char, Free> memory_;
  size_t size_ = 0;
  size_t used_ = 0;
};

// One value per channel in any floating dtype and with any stride.
class ChannelVector {
 public:
  ChannelVector() = default;
  explicit ChannelVector(const OptionalTensor& t) {
    if (!t) return;
    data_ = static_cast<char*>(t->data_ptr());
    dtype_ = t->scalar_type();
    stride_ = t->dim() ? t->stride(0) : 1;
  }
  explicit operator bool() const { return data_ != nullptr; }

  // Channels [c0, c1) to and from doubles.
  void read(int64_t c0, int64_t c1, double* to) const {
    with_scalar([&]<class S>(S*) {
      for (int64_t c = c0; c < c1; ++c) to[c - c0] = static_cast<double>(static_cast<Wide<S>>(at<S>(c)));
    });
  }
  void write(int64_t c0, int64_t c1, const double* from) const {
    with_scalar([&]<class S>(S*) {
      for (int64_t c = c0; c < c1; ++c) at<S>(c) = static_cast<S>(static_cast<Wide<S>>(from[c - c0]));
    });
  }

 private:
  template <class S>
  using Wide = std::conditional_t<std::is_same_v<S, double>, double, float>;

  template <class F>
  void with_scalar(const F& f) const {
    switch (dtype_) {
      case ScalarType::Float:
        return f(static_cast<float*>(nullptr));
      case ScalarType::Double:
        return f(static_cast<double*>(nullptr));
      case ScalarType::BFloat16:
        return f(static_cast<torch::headeronly::BFloat16*>(nullptr));
      default:
        return f(static_cast<torch::headeronly::Half*>(nullptr));
    }
  }

  template <class S>
  S& at(int64_t c) const {
    return reinterpret_cast<S*>(data_)[c * stride_];
  }

  char* data_ = nullptr;
  ScalarType dtype_ = ScalarType::Float;
  int64_t stride_ = 1;
};

// Returns `function` of the best instruction set that this machine has and the build contains.
#if defined(FUSEDRES_WITHOUT_AVX512)
#define FUSEDRES_IF_AVX512(function)
#else
#define FUSEDRES_IF_AVX512(function) \
  if (cpu_capability() >= Capability::avx512) return avx512::function;
#endif
#if defined(FUSEDRES_WITHOUT_AVX2)
#define FUSEDRES_IF_AVX2(function)
#else
#define FUSEDRES_IF_AVX2(function) \
  if (cpu_capability() >= Capability::avx2) return avx2::function;
#endif
#define FUSEDRES_RETURN_FOR_THIS_CPU(function) \
  FUSEDRES_IF_AVX512(function)                 \
  FUSEDRES_IF_AVX2(function)                   \
  return baseline::function

}  // namespace fusedres::cpu
