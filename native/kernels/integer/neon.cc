#define EDGEWISE_NEON neon
#include "edgewise/kernels.h"
#include "kernels/lanes_neon.h"

namespace edgewise::neon {
#include "kernels/functions.inl.h"
#include "kernels/integer/integer.inl.h"
}  // namespace edgewise::neon
