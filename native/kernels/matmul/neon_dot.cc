#define EDGEWISE_NEON neon_dot
#include "edgewise/kernels.h"
#include "kernels/lanes_neon.h"

namespace edgewise::neon_dot {
#include "kernels/matmul/matmul.inl.h"
}  // namespace edgewise::neon_dot
