#define EDGEWISE_AVX512 avx512
#include "edgewise/kernels.h"
#include "kernels/lanes_avx512.h"

namespace edgewise::avx512 {
#include "kernels/functions.inl.h"
#include "kernels/columns/columns.inl.h"
}  // namespace edgewise::avx512
