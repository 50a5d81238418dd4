#define EDGEWISE_NEON neon_i8mm
#include "tests/lanes/lanes.h"
#include "kernels/lanes_neon.h"

namespace edgewise::neon_i8mm {
#include "tests/lanes/lanes.inl.h"
}  // namespace edgewise::neon_i8mm
