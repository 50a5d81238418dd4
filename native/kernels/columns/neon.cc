#define EDGEWISE_NEON neon
#include "edgewise/kernels.h"
#include "kernels/lanes_neon.h"

namespace edgewise::neon {
#include "kernels/functions.inl.h"
#include "kernels/columns/columns.inl.h"
}  // namespace edgewise::neon
