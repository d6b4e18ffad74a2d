// What the ops of synchronised batch norm ask of their arguments. A part of the batch may be empty; it has no layout.
#pragma once

#include "batch_norm.h"

namespace fusedres {

inline Layout4d layout_of_part(const Tensor& x) {
  STD_TORCH_CHECK(x.dim() == 4, "x must have 4 dimensions, but got ", x.dim());
  return x.numel() == 0 ? Layout4d{0, x.size(1), 0, 0, true} : layout_of(x);
}

// What processes exchange: two numbers per channel and a count, in float64.
inline int64_t exchanged_numbers(int64_t channels) { return 2 * channels + 1; }

inline void check_exchanged(const char* name, const Tensor& t, int64_t dim, const Tensor& x) {
  STD_TORCH_CHECK(
      t.dim() == dim && t.numel() > 0 && t.size(dim - 1) == exchanged_numbers(x.size(1)) && t.is_contiguous() &&
          t.scalar_type() == ScalarType::Double,
      name,
      " must be contiguous float64, with 2C + 1 numbers of each process");
  check_same_device(name, t, x);
}

inline void check_sync_forward(
    const NormArguments& a,
    const Tensor& x,
    const OptionalTensor& residual,
    const Tensor& partials,
    bool relu,
    bool save_mask) {
  check_norm_arguments(a, x, x.size(1));
  check_exchanged("partials", partials, 2, x);
  if (residual && x.numel() > 0) check_same_layout("residual", *residual, x);
  STD_TORCH_CHECK(
      !save_mask || (relu && residual), "save_mask is for a residual and a ReLU; otherwise the mask is recomputed");
}

inline void check_sync_backward(
    const Tensor& dy,
    const Tensor& x,
    const OptionalTensor& weight,
    const OptionalTensor& bias,
    const Tensor& stats,
    const OptionalTensor& mask,
    const Layout4d& layout) {
  check_channel_vectors({&weight, &bias}, x, layout.channels);
  check_statistics(stats, x, layout.channels);
  if (x.numel() == 0) return;
  check_same_layout("dy", dy, x);
  if (mask) check_mask(*mask, x, mask_bytes(layout));
}

}  // namespace fusedres
