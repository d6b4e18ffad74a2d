// Argument checks of the native ops. They guard memory; the words a user reads come from fusedres/ops/checks.py.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <initializer_list>
#include <optional>

namespace fusedres {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

inline bool is_low_precision(ScalarType dtype) { return dtype == ScalarType::BFloat16 || dtype == ScalarType::Half; }

inline void check_same_device(const char* name, const Tensor& t, const Tensor& x) {
  STD_TORCH_CHECK(t.is_cpu() ? x.is_cpu() : t.device() == x.device(), name, " must be on the device of x");
}

inline void check_same_layout(const char* name, const Tensor& t, const Tensor& x) {
  bool same = t.dim() == x.dim() && t.scalar_type() == x.scalar_type();
  for (int64_t d = 0; same && d < x.dim(); ++d) {
    same = t.size(d) == x.size(d) && (t.stride(d) == x.stride(d) || x.size(d) == 1);
  }
  STD_TORCH_CHECK(same, name, " must have the shape, dtype and strides of x");
  check_same_device(name, t, x);
}

// Vectors with one value per channel: all in the dtype of x or, for 16-bit x, all in float32.
inline void check_channel_vectors(
    std::initializer_list<const OptionalTensor*> vectors, const Tensor& x, int64_t channels) {
  std::optional<ScalarType> first;
  for (const OptionalTensor* v : vectors) {
    if (!*v) continue;
    const Tensor& t = **v;
    STD_TORCH_CHECK(
        t.dim() == 1 && t.numel() == channels, "statistics and parameters must have one element per channel");
    const ScalarType dtype = t.scalar_type();
    if (!first) first = dtype;
    STD_TORCH_CHECK(
        dtype == *first &&
            (dtype == x.scalar_type() || (is_low_precision(x.scalar_type()) && dtype == ScalarType::Float)),
        "statistics and parameters have dtypes that do not go with that of x");
    check_same_device("every statistic and parameter", t, x);
  }
}

// The statistics that a forward saved: (3, C), float64 for float64 x and float32 otherwise.
inline void check_statistics(const Tensor& stats, const Tensor& x, int64_t channels) {
  const ScalarType dtype = x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  STD_TORCH_CHECK(
      stats.dim() == 2 && stats.size(0) == 3 && stats.size(1) == channels && stats.is_contiguous() &&
          stats.scalar_type() == dtype,
      "stats must be the (3, C) statistics that the forward returned");
  check_same_device("stats", stats, x);
}

inline void check_mask(const Tensor& mask, const Tensor& x, int64_t bytes) {
  STD_TORCH_CHECK(
      mask.dim() == 1 && mask.numel() == bytes && mask.is_contiguous() && mask.scalar_type() == ScalarType::Byte,
      "mask must be the one that the forward returned");
  check_same_device("mask", mask, x);
}

}  // namespace fusedres
