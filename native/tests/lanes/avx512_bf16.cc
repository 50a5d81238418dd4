#define EDGEWISE_AVX512 avx512_bf16
#include "tests/lanes/lanes.h"
#include "kernels/lanes_avx512.h"

namespace edgewise::avx512_bf16 {
#include "tests/lanes/lanes.inl.h"
}  // namespace edgewise::avx512_bf16
