// The driver's side of add_act: its kernels for this machine. Shared by the families that mask a gradient.
#pragma once

#include "add_act_kernels.h"
#include "driver.h"

namespace fusedres::cpu {

template <class T>
const AddActKernels<T>& add_act_kernels() {
  FUSEDRES_RETURN_FOR_THIS_CPU(add_act_kernels<T>());
}

}  // namespace fusedres::cpu
