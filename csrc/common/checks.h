// Argument checks of the native ops. They guard memory; the words a user reads come from fusedres/ops/checks.py.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <optional>

namespace fusedres {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

inline bool is_low_precision(ScalarType dtype) { return dtype == ScalarType::BFloat16 || dtype == ScalarType::Half; }

inline void check_same_layout(const char* name, const Tensor& t, const Tensor& x) {
  bool same = t.dim() == x.dim() && t.scalar_type() == x.scalar_type();
  for (int64_t d = 0; same && d < x.dim(); ++d) {
    same = t.size(d) == x.size(d) && (t.stride(d) == x.stride(d) || x.size(d) == 1);
  }
  STD_TORCH_CHECK(same, name, " must have the shape, dtype and strides of x");
}

// A vector with one value per channel, in the dtype of x or, for 16-bit x, in float32.
inline void check_channel_vector(const char* name, const OptionalTensor& v, const Tensor& x, int64_t channels) {
  if (!v) return;
  STD_TORCH_CHECK(v->dim() == 1 && v->numel() == channels, name, " must have one element per channel");
  const ScalarType dtype = v->scalar_type();
  STD_TORCH_CHECK(
      dtype == x.scalar_type() || (is_low_precision(x.scalar_type()) && dtype == ScalarType::Float),
      name,
      " has a dtype that does not go with that of x");
  STD_TORCH_CHECK(v->is_cpu() == x.is_cpu(), name, " must be on the device of x");
}

}  // namespace fusedres
