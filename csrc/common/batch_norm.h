// The arguments of one batch normalisation: their checks, and the tensors that its ops return.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <optional>

#include "checks.h"
#include "layout.h"

namespace fusedres {

struct NormArguments {
  OptionalTensor weight, bias, running_mean, running_var, num_batches_tracked;
  bool training;
  std::optional<double> momentum;
  double eps;
};

// The arguments without the batch: of one that other processes have more of, a part may be of any size.
inline void check_norm_arguments(const NormArguments& a, const Tensor& x, int64_t channels) {
  check_channel_vectors({&a.weight, &a.bias, &a.running_mean, &a.running_var}, x, channels);
  if (a.training) {
    STD_TORCH_CHECK(a.eps > 0, "eps must be positive during training");
    STD_TORCH_CHECK(
        a.running_mean.has_value() == a.running_var.has_value(), "running_mean and running_var go together");
  } else {
    STD_TORCH_CHECK(!(a.eps < 0), "eps must be non-negative");
    STD_TORCH_CHECK(a.running_mean && a.running_var, "evaluation needs running_mean and running_var");
  }
  if (a.num_batches_tracked) {
    STD_TORCH_CHECK(
        a.num_batches_tracked->numel() == 1 && a.num_batches_tracked->scalar_type() == ScalarType::Long,
        "num_batches_tracked must be one int64 value");
    check_same_device("num_batches_tracked", *a.num_batches_tracked, x);
  }
  STD_TORCH_CHECK(a.momentum || a.num_batches_tracked || !a.training, "momentum=None needs num_batches_tracked");
}

inline void check_norm(const NormArguments& a, const Tensor& x, const Layout4d& layout) {
  check_norm_arguments(a, x, layout.channels);
  STD_TORCH_CHECK(layout.numel() > 0, "x must not be empty");
  STD_TORCH_CHECK(!a.training || layout.pixels() > 1, "training needs more than one value per channel");
}

inline Tensor empty_statistics(const Layout4d& layout, const Tensor& x) {
  const int64_t sizes[] = {3, layout.channels}, strides[] = {layout.channels, 1};
  const ScalarType dtype = x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  return empty_strided(sizes, strides, 2, dtype, x);
}

// One bit per element, in 16-bit words; see fusedres/ops/layout.py.
inline int64_t mask_bytes(const Layout4d& layout) {
  if (layout.channels_last) return (layout.numel() + 15) / 16 * 2;
  return layout.batch * layout.channels * ((layout.area() + 15) / 16) * 2;
}

// A gradient that may not be wanted: a tensor, or one of no elements.
inline Tensor wanted_like(bool wanted, const Tensor& x) {
  return wanted ? uninitialized_like(x) : empty_vector(0, x.scalar_type(), x);
}

inline Tensor wanted_parameter_gradient(bool wanted, const OptionalTensor& weight, const Tensor& stats) {
  const int64_t channels = stats.size(1);
  return empty_vector(wanted ? channels : 0, weight ? weight->scalar_type() : stats.scalar_type(), stats);
}

}  // namespace fusedres
