#define EDGEWISE_AVX512 avx512
#include "tests/lanes/lanes.h"
#include "kernels/lanes_avx512.h"

namespace edgewise::avx512 {
#include "tests/lanes/lanes.inl.h"
}  // namespace edgewise::avx512
