#define EDGEWISE_NEON neon_i8mm
#include "edgewise/kernels.h"
#include "kernels/lanes_neon.h"

namespace edgewise::neon_i8mm {
#include "kernels/functions.inl.h"
#include "kernels/columns/columns.inl.h"
}  // namespace edgewise::neon_i8mm
