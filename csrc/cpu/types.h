// Storage types of the CPU kernels. No torch headers: the kernel halves are compiled without them.
#pragma once

#include <cstdint>

namespace fusedres::cpu {

struct bf16 {
  uint16_t bits;
};

struct half {
  uint16_t bits;
};

constexpr int kLanes = 16;

// See traverse.h.
struct Rows {
  int64_t count;
  int64_t width;
  int64_t tail;
};

struct Planes {
  int64_t channels;
  int64_t area;
};

}  // namespace fusedres::cpu
