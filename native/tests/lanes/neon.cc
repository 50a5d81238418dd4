#define EDGEWISE_NEON neon
#include "tests/lanes/lanes.h"
#include "kernels/lanes_neon.h"

namespace edgewise::neon {
#include "tests/lanes/lanes.inl.h"
}  // namespace edgewise::neon
