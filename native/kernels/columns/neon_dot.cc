#define EDGEWISE_NEON neon_dot
#include "edgewise/kernels.h"
#include "kernels/lanes_neon.h"

namespace edgewise::neon_dot {
#include "kernels/functions.inl.h"
#include "kernels/columns/columns.inl.h"
}  // namespace edgewise::neon_dot
