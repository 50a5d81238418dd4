#define EDGEWISE_NEON neon_dot
#include "tests/lanes/lanes.h"
#include "kernels/lanes_neon.h"

namespace edgewise::neon_dot {
#include "tests/lanes/lanes.inl.h"
}  // namespace edgewise::neon_dot
