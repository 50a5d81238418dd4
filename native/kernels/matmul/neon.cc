#define EDGEWISE_NEON neon
#include "edgewise/kernels.h"
#include "kernels/lanes_neon.h"

namespace edgewise::neon {
#include "kernels/matmul/matmul.inl.h"
}  // namespace edgewise::neon
