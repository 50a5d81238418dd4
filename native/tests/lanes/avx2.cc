#include "tests/lanes/lanes.h"
#include "kernels/lanes_avx2.h"

namespace edgewise::avx2 {
#include "tests/lanes/lanes.inl.h"
}  // namespace edgewise::avx2
