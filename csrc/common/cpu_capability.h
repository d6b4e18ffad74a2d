// The instruction set that the CPU kernels run with: what this machine has, lowered by FUSEDRES_CPU_CAPABILITY.
#pragma once

#include <cstdlib>
#include <cstring>

namespace fusedres {

enum class Capability { baseline, avx2, avx512 };

inline const char* name(Capability capability) {
  switch (capability) {
    case Capability::avx512:
      return "avx512";
    case Capability::avx2:
      return "avx2";
    default:
      return "baseline";
  }
}

inline Capability cpu_capability() {
  static const Capability capability = [] {
    Capability best = Capability::baseline;
#if defined(__x86_64__)
    // As the flags of csrc/build_native.py: a variant may use everything that its flags name.
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {  // F16C is older than AVX2
      best = Capability::avx2;
      if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
          __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
          __builtin_cpu_supports("avx512bf16")) {
        best = Capability::avx512;
      }
    }
#endif
    const char* wanted = std::getenv("FUSEDRES_CPU_CAPABILITY");
    for (Capability lower : {Capability::baseline, Capability::avx2}) {
      if (wanted && std::strcmp(wanted, name(lower)) == 0 && lower < best) best = lower;
    }
    return best;
  }();
  return capability;
}

}  // namespace fusedres
