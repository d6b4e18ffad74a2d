// The CPU kernels of add_act over elements [begin, end) in memory order; begin is a multiple of 16.
#pragma once

#include "types.h"

namespace fusedres::cpu {

template <class T>
struct AddArgs {
  const T* x;
  const T* residual;
  T* out;
  uint16_t* mask;  // or null
  bool relu;
  bool stream;
};

template <class T>
struct MaskArgs {
  const T* dy;
  const uint16_t* mask;
  T* dx;
  bool stream;
};

template <class T>
struct AddActKernels {
  void (*add)(const AddArgs<T>&, int64_t begin, int64_t end);
  void (*mask_gradient)(const MaskArgs<T>&, int64_t begin, int64_t end);
};

#define FUSEDRES_DECLARE_ADD_ACT(isa)        \
  namespace isa {                            \
  template <class T>                         \
  const AddActKernels<T>& add_act_kernels(); \
  }
FUSEDRES_DECLARE_ADD_ACT(baseline)
FUSEDRES_DECLARE_ADD_ACT(avx2)
FUSEDRES_DECLARE_ADD_ACT(avx512)
#undef FUSEDRES_DECLARE_ADD_ACT

}  // namespace fusedres::cpu
