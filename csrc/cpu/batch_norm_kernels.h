// The CPU kernels of batch normalisation over part of a tensor, as the drivers call them: one table per storage type
// and instruction set. Channel ranges are columns of Rows (see traverse.h) or channels of Planes.
#pragma once

#include "types.h"

namespace fusedres::cpu {

template <class T>
struct ScalarOf {
  using type = float;
};
template <>
struct ScalarOf<double> {
  using type = double;
};

// What the kernels take per column or channel is in one table: groups of kLanes columns, with a vector of every kind,
// so that one pointer reaches them all and a walk along the columns reads one stream.
//
//   y = (x - mean) * scale + shift          of a pair: (x - mean) * scale + (x2 - mean2) * scale2 + shift
//   dx = g * scale + (x - mean) * of_x + constant
//
// The forward's table ends before of_x.
template <bool kPair>
struct Slots {
  static constexpr int mean = 0, scale = 1, shift = 2, mean2 = 3, scale2 = 4;
  static constexpr int of_x = kPair ? 5 : 3, constant = of_x + 1, of_x2 = of_x + 2, constant2 = of_x + 3;
  static constexpr int forward = of_x, backward = kPair ? 9 : 5;
};

enum class ReluMask { none, recomputed, stored };

// Rows or planes [begin, end) and columns or channels [c0, c1).
struct Range {
  int64_t begin, end, c0, c1;
};

template <class T>
struct ForwardArgs {
  using S = typename ScalarOf<T>::type;
  const S* params;
  const T* x;
  const T* residual;  // or null
  const T* x2;        // or null: a second normalised input
  T* out;
  uint16_t* mask;  // or null
  bool relu;
  bool stream;
};

template <class T>
struct BackwardArgs {
  using S = typename ScalarOf<T>::type;
  const S* params;
  const T* dy;
  const T* x;
  const T* x2;  // or null
  const uint16_t* mask;
  ReluMask relu;
  // apply
  T* dx;                 // or null
  T* dx2;                // or null
  T* dresidual;          // or null
  bool uses_x, uses_x2;  // false in evaluation, where dx = g * scale whatever x is
  bool stream;
  bool in_double;  // reduce: all of it
};

template <class T>
struct BatchNormKernels {
  // mean and the sum of squared deviations of a range, per column or channel
  void (*statistics_rows)(const T* x, const Rows&, const Range&, bool in_double, double* mean, double* m2);
  void (*statistics_planes)(const T* x, const Planes&, const Range&, bool in_double, double* mean, double* m2);
  void (*forward_rows)(const ForwardArgs<T>&, const Rows&, const Range&);
  void (*forward_planes)(const ForwardArgs<T>&, const Planes&, const Range&);
  // adds sum g, sum g*(x - mean) and, with x2, sum g*(x2 - mean2)
  void (*reduce_rows)(const BackwardArgs<T>&, const Rows&, const Range&, double* const* sums);
  void (*reduce_planes)(const BackwardArgs<T>&, const Planes&, const Range&, double* const* sums);
  void (*backward_rows)(const BackwardArgs<T>&, const Rows&, const Range&);
  void (*backward_planes)(const BackwardArgs<T>&, const Planes&, const Range&);
};

#define FUSEDRES_DECLARE_BATCH_NORM(isa)           \
  namespace isa {                                  \
  template <class T>                               \
  const BatchNormKernels<T>& batch_norm_kernels(); \
  }
FUSEDRES_DECLARE_BATCH_NORM(baseline)
FUSEDRES_DECLARE_BATCH_NORM(avx2)
FUSEDRES_DECLARE_BATCH_NORM(avx512)
#undef FUSEDRES_DECLARE_BATCH_NORM

}  // namespace fusedres::cpu
